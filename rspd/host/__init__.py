"""What Unix and systemd want of a service.

upgrade  `rspd upgrade`: a process executes the program anew in its place
store    what systemd keeps from one process to the next
systemd  passed sockets, notifications, watchdog
detach   becoming a daemon, and where the log goes then
pidfile  the pid file
"""
