"""The commands that look at a running rspd.

connections  the open connections, as a table
troubles     what is wrong, in sentences
asking       the options that all of them have, and whom they ask
words        numbers, durations and names, as people read them
"""
