"""One client, from accept to its line in the log.

proxy        accepting clients, no more at once than allowed, and draining
connection   one client: admitted, connected, relayed, closed, one log line
first_bytes  the PROXY header that comes before what the client sends
access       whether a client may connect, and what the log says of refused clients
places       the wait of clients while max_connections are open
"""
