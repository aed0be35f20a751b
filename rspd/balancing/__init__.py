"""Which backend, and the way to it.

pool       the one door: dialling for a client, choosing, applying a configuration
attempts   one client's attempts at backends, and the queue of those who wait for one
wording    the backends in words, for the log and the status
members    which backends a pool has, and what follows from the state of each
backend    how a backend is: its states, and every way from one to another
policies   which of several backends gets the next connection
health     whether a backend is well
discovery  sources: where the addresses of backends come from
"""
