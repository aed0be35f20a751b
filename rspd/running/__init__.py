"""One process: start, signals, reload, drain.

service  one run: proxies, loop, signals, reload, drain, what systemd hears of it
room     room for the descriptors that a configuration needs
sockets  which socket from systemd goes with which proxy and address
"""
