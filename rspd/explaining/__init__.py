"""What a configuration means, for people, and for the next process.

dump     all values in force, defaults included, as a configuration file
summary  what rspd does by a configuration, in words
"""
