"""rspd, the Really Simple Proxy daemon: accepts TCP connections and relays each to a backend.

The modules, from the top down; each imports only from those below it:

cli             the command line: options over the configuration file, --check, exit codes
description     what rspd does by a configuration, in words
dump            all values in force, defaults included, as a configuration file
service         one run: proxies, loop, signals, reload, drain, what systemd hears of it
process         becoming a daemon: detaching, and where the log goes then
pidfile         the pid file
systemd         passed sockets, notifications, watchdog
proxy           accepting clients, no more at once than allowed, and draining
connection      one client: who it is, connect, relay, close, one log line
dialler         a client's way to a backend: attempts, and the queue of clients that wait for a backend
backends        the backends of a proxy: which there are, the state of each, which is next
backend         the state of one backend
health          whether a backend is well
names           host names looked up again and again
dialling        connecting to a backend's addresses
resolver        names looked up off the loop
descriptors     room for the descriptors that a configuration needs
adoption        which socket from systemd goes with which proxy and address
shortage        running out of descriptors
ways            which proxies a connection has passed, so that none is passed twice
places          clients that wait because all places are taken
listener        listening sockets: bound or adopted, accepted from, closed
balance         policies: which of several backends gets the next connection
relay           two flows between two sides, until both have ended
flow            one direction of a connection: copied or spliced
proxy_protocol  who the client is, as one proxy tells the next
side            one side of a connection: a socket and its readiness
pipes           pipes for splice(2), shared by the flows
access          which clients may connect, and what the log says of refused clients
loop            the epoll loop: tasks, readiness, timers, wake-up by signals and threads
config          file and command line -> named tuples, all keys and defaults
schema          a file's entries, read by tables of keys; all errors in them
values          single values: durations, numbers, switches, words
yamlfile        a YAML file as keys and values with their lines
yamlfaults      what is wrong with a file that is no YAML
networks        networks: which clients are in them, and the key of a client
address         addresses: parsed, printed, resolved
log             the log on stderr
cause           why a connection ended
errors          why rspd cannot run
"""

__version__ = "0.2.0"
