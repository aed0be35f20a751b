"""One client, from accept to its line in the log.

proxy        accepting clients, no more at once than allowed, and draining
connection   one client: who it is, connect, relay, close, one log line
first_bytes  what a client says first, where that is for rspd
access       which clients may connect, and what the log says of refused clients
places       clients that wait because all places are taken
"""
