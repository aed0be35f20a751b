"""rspd, the Really Simple Proxy daemon: accepts TCP connections and relays each to a backend.

A folder imports only from folders below it, and not from all of them. Each folder has a map of its own.

commands    looking at a running rspd: status, connections, top
cli         the command line: options over the configuration file, --check, exit codes
parser      the words of a command line: kind messages, exit codes
running     one process: start, signals, reload, drain
observing   what goes on in this process, for who looks
serving     one client, from accept to its line in the log
routing     which pool, by what a client says first
balancing   which backend, and the way to it
listening   what this process listens on
admin       HTTP for who looks: asked, answered, summed up, and as metrics
explaining  what a configuration means, for people and as a file
config      reading the configuration file
host        what Unix and systemd want of a service
settings    what is wanted, as named tuples; every default
histogram   counting durations
snapshot    what is, as named tuples
net         sockets and addresses
protocols   bytes understood: no loop, no socket
engine      moving bytes; knows nothing of all this
log         the log on stderr
errors      why rspd cannot run, or cannot do what a file says
"""

__version__ = "0.3.0"
