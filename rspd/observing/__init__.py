"""What goes on in this process, for who looks.

pace         the work of all who look, spread over turns of the loop
life         this process: which one it is, and what has become of it so far
"""
