"""The commands that look at a running rspd.

words        numbers, durations and names, as people read them
"""
