"""Bytes understood: no loop, no socket.

proxy_protocol  who the client is, as one proxy tells the next; called by serving/first_bytes
tls             which server a TLS client wants: the ClientHello
http            which host an HTTP client wants: the head of its request
ssh             whether a client speaks SSH
first           what a client has said first, whatever its protocol
"""
