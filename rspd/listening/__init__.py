"""What this process listens on.

sockets    what is wanted, from systemd or our own: planned, then opened
replacing  which listeners stay, and which are opened and closed, when others are wanted
allowing   who may connect to a unix socket
"""
