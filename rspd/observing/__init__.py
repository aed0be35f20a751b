"""What goes on in this process, for who looks.

desk         the control socket and the metrics: what listens there
answers      what is answered there
proxies      proxies, routes, pools and backends as they are
connections  the open connections as they are
samples      samples of what goes on, for rates
pace         the work of all who look, spread over turns of the loop
life         this process: which one it is, and what has become of it so far
"""
