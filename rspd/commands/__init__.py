"""The commands that look at a running rspd.

asking       the options that all of them have, and whom they ask
words        numbers, durations and names, as people read them
"""
