"""Who looks at a running rspd, and what is said to them.

metrics  the counters in Prometheus' formats
history  sums over workers, which never go back whatever becomes of a worker
rates    what goes on each second, by the difference of looks
merging  what several processes of one service say, as if they were one
client   asking a running rspd by its control socket
server   HTTP/1.1 over a listener: one request a connection, bounded in all that it takes
request  a request and an answer
query    which connections somebody asks for
"""
