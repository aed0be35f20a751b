"""Which backend, and the way to it.

pool       a client's way to a backend: attempts, and the queue of clients that wait for a backend
members    the backends of a proxy: which there are, the state of each, which is next
backend    the state of one backend
policies   which of several backends gets the next connection
health     whether a backend is well
discovery  host names looked up again and again
"""
