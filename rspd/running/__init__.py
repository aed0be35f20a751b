"""One process: start, signals, reload, drain.

service  one run: start, signals, reload, drain
status   what systemd hears of it
proxies  the proxies: those configured, and those taken out that still have connections
room     room for the descriptors that a configuration needs
sockets  which socket from systemd goes with which proxy and address
"""
