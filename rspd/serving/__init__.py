"""One client, from accept to its line in the log.

proxy        accepting clients, no more at once than allowed, and draining
admission    the steps between accepting and dialling: whether, and as whom, a client may come
connection   one client: its steps, dial, relay, close, one log line
openings     what is said to a backend before the relay begins: the PROXY header
first_bytes  what a client says before all else: the PROXY header
access       whether a client may connect, and what the log says of refused clients
places       the wait of clients while max_connections are open
"""
