"""Sockets and addresses.

connect      connecting to a backend's addresses
descriptors  room for descriptors, and what to do where they run out
ways         which proxies a connection has passed, so that none is passed twice
resolver     one lookup of a name, in a thread
listener     listening sockets: bound or adopted, accepted from, closed
waiting      how a task waits for an answer: until woken, late, or given up
networks     which clients are in a network, and the key of a client
address      where to listen or what to dial: as configured, as sockets take it, printed
"""
