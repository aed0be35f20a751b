"""rspd and its peers, measured side by side: `make bench`. What is measured, and how, is in bench/README.md.

The modules, from the top down; each imports only from those below it:

restarts       a command line of its own: restarts under load
__main__       the command line, and the order of a run
report         figures -> tables in Markdown, a picture in SVG, targets met or missed
targets        what rspd is to reach, and whether a run's figures do
ab             a work with an ordinary client and an ordinary web server
works          what each contestant is given to do, and what is read of it
ways           the ways to restart the contestants
store          what systemd does for rspd at a restart
peers          the contestants: what is started, with which settings, and where to get what is missing
counters       CPU time and memory of processes
turns          a program of its own: rspd with a clock in its loop
asyncio_relay  a program of its own: the Python baseline
visitors       a program of its own: the load and the backend of restarts
load.c         a program of its own: the load and the backend
settings/      the contestants' settings; @NAME@ is filled in
"""
