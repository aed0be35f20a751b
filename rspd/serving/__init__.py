"""One client, from accept to its line in the log.

proxy        accepting clients, no more at once than allowed, and draining
resuming     a connection as it is handed over, and made again in the next process
admission    the steps before dialling; each may refuse the client
connection   one client: its steps, dial, relay, close, one log line; an answer if it gets no backend
first_bytes  what a proxy in front says before all else: the PROXY header
access       allow, deny and the limit for each client; what the log says of refused clients
places       the wait of clients while max_connections are open
tally        what a proxy has counted so far
"""
