"""What Unix and systemd want of a service.

systemd  passed sockets, notifications, watchdog
detach   becoming a daemon, and where the log goes then
pidfile  the pid file
"""
