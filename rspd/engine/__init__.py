"""Moving bytes; knows nothing of listeners, backends and configuration.

relay    two flows between two sides, until both have ended; closes both sides
flow     one direction of a connection: copied or spliced
side     one side of a connection: a socket and its readiness; all calls on it, splice(2) too
pipes    pipes for splice(2), shared by the flows
loop     the epoll loop: tasks, readiness, timers
timers   when tasks are to be resumed because time has passed
wakeups  how signals and threads reach the loop
cause    why a connection ended
"""
