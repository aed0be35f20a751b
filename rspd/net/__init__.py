"""Sockets and addresses.

connect      connecting to a backend's addresses
descriptors  room for descriptors, and what to do where they run out
ways         which proxies a connection has passed, so that none is passed twice
resolver     names looked up off the loop
listener     listening sockets: bound or adopted, accepted from, closed
waiting      one way to wait: until woken, up to a deadline, unless given up
networks     networks: which clients are in them, and the key of a client
address      addresses: where to listen or what to dial, as sockets take them, printed
"""
