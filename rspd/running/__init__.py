"""One process: start, signals, reload, drain.

service   one run: start, signals, reload, drain
upgrade   whether this process may execute the program anew
handover  what goes on in the next process
legacy    what the process before has left
document  what is handed over, as bytes
status    what systemd hears of this process
proxies   which proxies there are: those configured, and those taken out with connections left
"""
