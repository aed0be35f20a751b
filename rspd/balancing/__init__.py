"""Which backend, and the way to it.

pool       Dialler: a client's attempts at backends, and the queue of clients that wait for one
members    which backends a proxy has, which is next, and all changes of their state
backend    the state of one backend
policies   which of several backends gets the next connection
health     whether a backend is well
discovery  sources: where the addresses of backends come from
"""
