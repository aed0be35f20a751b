"""Which pool, by what a client says first.

router    the routes of a proxy at work: their pools, who is heard, and what is chosen
pools     pools by name
openings  what is said to a backend before the relay begins: the PROXY header
table     which route a client takes
heads     the first bytes of a client, from when they are awaited
answers   what a client is told that gets no backend, in its own protocol
"""
