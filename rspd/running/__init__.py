"""One process: start, signals, reload, drain.

service  one run: start, signals, reload, drain
status   what systemd hears of it
proxies  the proxies: those configured, and those taken out that still have connections
sockets  what is listened on: sockets that systemd passed, and our own
"""
