"""How signals and threads reach the loop: they leave calls for it, and wake it by a socket."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class Wakeups:
    """Calls left by signals and threads, which the loop has yet to make.

    fd: readable once a call has been left.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}  # the handlers before ours
        self._actions: dict[int, Callable[[], object]] = {}  # by signal
        self._arrived: dict[int, object] = {}  # signals whose actions are to be called; the values mean nothing
        self._calls: deque[Callable[[], object]] = deque()
        self._read, self._write = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.fd = self._read.fileno()

    def close(self) -> None:
        """Give back the descriptors and the signal handlers."""
        if self._handlers:
            signal.set_wakeup_fd(-1)
            for number, previous in self._handlers.items():
                signal.signal(number, previous)
        self._read.close()
        self._write.close()

    def on_signal(self, number: int, action: Callable[[], object]) -> None:
        """Call `action` from the loop when the process gets the signal, once a turn at most. Main thread only."""
        if not self._handlers:
            signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        # The interpreter also writes to the wake-up socket, which ends a wait in the kernel; the handler has run
        # by the time the wait returns.
        #
        # The handler is not written in Python. A function would be interrupted by the next signal, and so on: many
        # signals at once would end in RecursionError.
        self._actions[number] = action
        self._handlers.setdefault(number, signal.signal(number, self._arrived.setdefault))

    def run_in_thread(self, function: Callable[[], T], then: Callable[[T | Exception], object]) -> None:
        """Run a function that blocks in a thread of its own, then call `then` from the loop with its outcome.

        The thread is a daemon: one that hangs delays nothing, not even the end of the process.
        Raises RuntimeError if the thread cannot be started.
        """

        def work() -> None:
            outcome: T | Exception
            # Signals are for the main thread, which may block them.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                outcome = function()
            except Exception as error:
                outcome = error
            self._calls.append(lambda: then(outcome))
            try:
                self._write.send(b"\0")
            except OSError:
                pass  # full: a wake-up is under way already; closed: nobody is left to hear

        threading.Thread(target=work, daemon=True).start()

    def run_calls(self) -> None:
        """Make the pending calls."""
        # Read the socket first, then look for calls: a call that is left later writes a byte of its own. How many bytes
        # there are says nothing, since a full socket takes no more. There may be none (EAGAIN), or no memory to read
        # them (ENOMEM).
        try:
            self._read.recv(4096)
        except OSError:
            pass
        for number in list(self._arrived):
            del self._arrived[number]
            self._calls.append(self._actions[number])
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:
                log.exception("a call from a signal or a thread failed; this is a bug")
