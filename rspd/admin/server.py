"""HTTP/1.1 over listeners, for who looks at this process: one request a connection, bounded in all that it takes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from errno import EAGAIN
from functools import partial
from math import inf

from rspd.admin.request import MOST, Answer, Request
from rspd.engine.loop import ERR, HUP, IN, Cancelled, Loop, Task, news
from rspd.engine.side import Side
from rspd.net.connect import send_all
from rspd.net.descriptors import Shortage
from rspd.net.listener import CLIENT_GONE, Listener
from rspd.net.waiting import wait
from rspd.protocols import http
from rspd.protocols.first import HEAD_MAX, HeadError

# Seconds for the head of a request, and for each piece of an answer; and for a whole answer.
PATIENCE, LONGEST = 5.0, 10.0

# Bytes of a piece.
PIECE = 1 << 16

# After an answer, what still comes is read: so many bytes, for so many seconds. To close with unread bytes would send
# RST, and that would destroy the end of the answer.
READ_MAX, READ_FOR = 1 << 16, 1.0

# Seconds without progress after which a reader may be given up for others that wait.
STALLED = 1.0

# Seconds for who may be about to ask, before it is given up for others that wait; and at a handover, where new clients
# wait meanwhile, for who is being answered.
ASKING, FINISHING = 0.05, 0.3

PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
}

Handler = Callable[[Request], Awaitable[Answer]]

log = logging.getLogger(__name__)


class Server:
    """Answers at listeners. The caller owns these.

    If MOST clients are there and others wait, one of the idle is given up: it has not said its request yet, or it has
    its answer and does not end.
    """

    def __init__(self, loop: Loop, shortage: Shortage, handler: Handler) -> None:
        """handler: answers a request, and raises nothing but a bug. It runs in the task of the request."""
        self._loop = loop
        self._shortage = shortage
        self._handler = handler
        self._listeners: list[Listener] = []  # first who has waited longest for a place
        self._watched: list[Listener] = []
        self._idle: dict[Task, float] = {}  # of clients that rspd waits for; from when each may be given up
        self._answering: set[Task] = set()
        self._task: Task | None = None

    def apply(self, listeners: Sequence[Listener]) -> None:
        """Answer at these listeners from now on. Those of before may be closed by now."""
        self.stop()
        self._listeners = list(listeners)
        if listeners:
            self._task = self._loop.spawn(self._serve())

    def stop(self) -> None:
        """Accept nobody any more. What is being answered goes on."""
        self._pause()
        self._listeners = []
        if self._task:
            self._task.cancel()
            self._task = None

    async def finish(self) -> None:
        """`stop`, and wait until those are answered who have come; not for long."""
        self.stop()
        loop = self._loop
        began = loop.now
        while loop.now < began + (FINISHING if self._answering else ASKING) and (self._answering or self._idle):
            await loop.sleep(ASKING / 5)

    def _pause(self) -> None:
        while self._watched:
            self._loop.unwatch(self._watched.pop())

    async def _serve(self) -> None:
        while True:
            try:
                await self._serve_ready()
            except OSError as error:
                self._pause()
                await self._shortage.wait(error)
            except Exception:
                log.exception("unexpected error of a control or metrics socket; please report it")
                self._pause()
                await self._loop.sleep(PATIENCE)

    async def _serve_ready(self) -> None:
        """Accept who waits at the listeners, or wait. Raises OSError."""
        room = MOST - len(self._idle) - len(self._answering)
        slowest = None if room else min(self._idle, key=self._idle.__getitem__, default=None)
        if not room and (slowest is None or self._idle[slowest] > self._loop.now):
            self._pause()
            self._loop.current.wake_at(self._idle[slowest] if slowest else inf)
            await news()
            return
        for listener in self._listeners:
            if listener not in self._watched:
                self._loop.watch(listener, IN)
                self._watched.append(listener)
        ready = [listener for listener in self._listeners if listener.ready]
        if not ready:
            await news()
            return
        if slowest:
            del self._idle[slowest]
            slowest.cancel()
        for listener in ready[:room]:
            self._listeners.remove(listener)
            self._listeners.append(listener)
            listener.ready = 0  # not edge-triggered: it is ready again if another client waits
            self._accept(listener)
        await self._loop.yield_turn()

    def _accept(self, listener: Listener) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in CLIENT_GONE or error.errno == EAGAIN:
                return
            raise
        side = listener.side(self._loop, sock)
        self._loop.spawn(self._talk(side), self._ended)

    def _ended(self, task: Task) -> None:
        self._idle.pop(task, None)
        self._answering.discard(task)
        self._wake()

    def _wake(self) -> None:
        if self._task:
            self._task.wake()

    async def _talk(self, side: Side) -> None:
        """One request and its answer. It closes the side, and owns it."""
        task = self._loop.current
        self._idle[task] = self._loop.now + ASKING  # its request may be on the way
        whole = False
        try:
            side.watch()
            heard = await self._hear(side)
            if isinstance(heard, Request):
                del self._idle[task]
                self._answering.add(task)
                answer = await self._answer(heard)
                await self._say(side, answer, heard.method == "HEAD")
                self._answering.discard(task)
                self._idle[task] = self._loop.now
                self._wake()
            elif heard:
                await self._say(side, heard)
            if heard:
                whole = True
                await self._see_off(side)
        except (OSError, Cancelled):
            pass  # the client is too slow, has gone, or was given up
        except Exception:
            log.exception("unexpected error, a request for the control or metrics socket fails; please report it")
        finally:
            (side.close if whole else side.abort)()

    async def _hear(self, side: Side) -> Request | Answer | None:
        """The request; or what is to be said if it is none; or None if nothing can be. Raises TimeoutError."""
        deadline = self._loop.now + PATIENCE
        data = b""
        while True:
            more = side.read(HEAD_MAX + 1 - len(data))
            if more:
                try:
                    said = http.read(data + more, len(data), relayed=False)
                except HeadError as error:
                    return Answer.error(400, str(error))
                data += more
                if said and said.protocol == "http":
                    return Request.of(said.method, said.target, data, partial(_gone, side))
                if said:
                    return Answer.error(400, "expected a request in HTTP/1.1, found another protocol")
            elif more is not None or side.aborted:
                return None
            else:
                await wait(self._loop, deadline)

    async def _answer(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return Answer.error(405, f"expected GET or HEAD, found {request.method:.20}: nothing can be changed here")
        try:
            return await self._handler(request)
        except ConnectionAbortedError:
            raise
        except Exception:
            log.exception("unexpected error, a look at this process fails; please report it")
            return Answer.error(500, "a bug in rspd; its log says more")

    async def _say(self, side: Side, answer: Answer, head_only: bool = False) -> None:
        """Send it. Raises OSError."""
        loop = self._loop
        longest = loop.now + LONGEST
        await send_all(side, answer.head(PHRASES[answer.status]), loop.now + PATIENCE)
        parts = () if head_only else answer.parts
        async for part in parts if isinstance(parts, AsyncIterator) else _each(parts):
            await self._send(side, part, longest)
            if side.aborted:
                return

    async def _see_off(self, side: Side) -> None:
        """End the stream, and wait for the client's end."""
        loop = self._loop
        side.end()
        deadline, left = loop.now + READ_FOR, READ_MAX
        while left > 0 and loop.now < deadline and not side.aborted:
            data = side.read(left)
            if data is None:
                loop.current.wake_at(deadline)
                await news()
            elif not data:
                return
            else:
                left -= len(data)

    async def _send(self, side: Side, part: bytes, longest: float) -> None:
        """Send a part. While the client takes nothing, it counts as idle, and others may take its place."""
        loop, task = self._loop, self._loop.current
        view = memoryview(part)
        progress, waiting = loop.now, False
        while view and not side.aborted:
            count = side.write(view[:PIECE])
            view = view[count:]
            if count:
                progress = loop.now
                if waiting:
                    del self._idle[task]
                    self._answering.add(task)
                    waiting = False
            elif not side.aborted:
                if task in self._answering:
                    self._answering.discard(task)
                    self._idle[task] = progress + STALLED
                    waiting = True
                    self._wake()
                await wait(loop, min(longest, progress + PATIENCE))


def _gone(side: Side) -> bool:
    """Whether nobody is left to read an answer. Who has only ended its own stream still reads."""
    return bool(side.ready & (HUP | ERR))


async def _each(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
