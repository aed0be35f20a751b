"""The commands that look at a running rspd.

top          what goes on, live, in a terminal
screen       what it shows, and what its keys do
tables       its tables
connections  the open connections, as a table
status       what is wrong, and what goes on, in one screen
troubles     what is wrong, in sentences
asking       the options that all of them have, and whom they ask
words        numbers, durations and names, as people read them
"""
