"""Two flows between two sides, until both have ended."""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from math import inf
from typing import Any

from rspd.engine.cause import Cause
from rspd.engine.flow import Flow, cut
from rspd.engine.loop import ERR, IN, Loop, news
from rspd.engine.pipes import Pipes
from rspd.engine.side import Handed, Side
from rspd.engine.side import resume as resume_side

# How long to wait before looking again whether a peer has acknowledged all that was sent to it: seconds,
# doubled each time up to the second figure. The kernel tells of this in no other way.
FIRST_LOOK, LAST_LOOK = 0.001, 0.1

# Without half-close, a side that was sending when the other ended may have more in its own kernel: at most so many
# bytes by default (tcp_wmem in tcp(7)), for which there was no room here. Once there is room, they come without a pause
# that is longer than a round trip: seconds, with some to spare.
SENDING_MAX = 4 << 20
PAUSE = 0.2


class Relay:
    """What moves a connection's two flows.

    client, backend: both watched by the task that runs the relay. The caller releases them with `close`.
    idle_timeout: seconds without a byte in either direction; up to twice as long while the kernel holds bytes.
    half_close_timeout: the same once one flow has ended, if it is shorter.
    half_close: whether the other flow goes on when one has ended. If not, both sides are ended then.
    bounds: of bytes, and of time, once both sides are being ended.
    """

    __slots__ = (
        "_deadline",
        "_first",
        "_half_closed_timeout",
        "_unsent",
        "backend",
        "bounds",
        "client",
        "download",
        "half_close",
        "idle_timeout",
        "loop",
        "upload",
    )

    def __init__(
        self,
        loop: Loop,
        client: Side,
        backend: Side,
        pipes: Pipes,
        idle_timeout: float,
        half_close_timeout: float,
        half_close: bool = True,
    ) -> None:
        self.loop = loop
        self.client = client
        self.backend = backend
        self.upload = Flow(client, backend, pipes)
        self.download = Flow(backend, client, pipes)
        self.idle_timeout = idle_timeout
        self._half_closed_timeout = min(idle_timeout, half_close_timeout)
        self.half_close = half_close
        self._unsent = 0
        self._deadline = loop.now + idle_timeout  # the first one
        self._first: Cause | None = None  # whose end has been passed on
        self.bounds: tuple[int, float] | None = None

    def hand_over(self) -> Handed:
        """What `resume` makes this relay from, in the next process. To be asked while its task waits."""
        handed: dict[str, Any] = {
            "client": self.client.hand_over(),
            "backend": self.backend.hand_over(),
            "upload": self.upload.hand_over(),
            "download": self.download.hand_over(),
            "timeouts": (self.idle_timeout, self._half_closed_timeout),
            "deadline": self.client.task.deadline if hasattr(self.client, "task") else self._deadline,
        }
        if not self.half_close or self._first or self._unsent:
            handed.update(half_close=self.half_close, first=self._first, bounds=self.bounds, unsent=self._unsent)
        return handed

    @types.coroutine
    def run(self) -> Generator[None, None, Cause]:
        """Relay until both flows have ended, a side has aborted, or a timeout has passed; return which it was.

        By then, what a side had sent before it aborted has been delivered. Without half-close, the end of one flow ends
        the other.
        """
        loop, client, backend, upload, download = self.loop, self.client, self.backend, self.upload, self.download
        task = loop.current
        cause: Cause | None
        task.wake_at(self._deadline)
        while True:
            more = (client.ready & IN or upload.waiting) and upload.pump()
            if (backend.ready & IN or download.waiting) and download.pump():
                more = True
            if (client.ready | backend.ready) & ERR:
                # Named, since `yield from` a coroutine has no type of its own for mypy.
                cause = yield from self._deliver_before_abort()
                return cause
            if upload.finished or download.finished:
                if upload.finished == download.finished:
                    # Both sides are closed next: this tells a peer the same as passing the end on.
                    return self._first or "client-closed"
                self._first = self._first or self._half_close()
                if not self.half_close:
                    cause = yield from self._end_both(self._first)
                    return cause
            if loop.now >= task.deadline and (cause := self._silence()):
                return cause
            if more:
                task.wake()
            yield  # as `news` does, without an object each time

    def go_on(self) -> Coroutine[Any, Any, Cause]:
        """`run` for a relay that `resume` has made. The running task watches both sides."""
        if not (self.bounds and self._first):
            return self.run()
        self.loop.current.wake_at(self._deadline)
        return self._end_both(self._first)

    def close(self) -> int:
        """Close both sides: each with FIN if all that was sent to it has been passed on, else with RST.

        With RST, what was cut short does not look complete. Returns how many bytes were lost: rspd had read them for a
        side, the side had not aborted, and the side has not acknowledged them.
        """
        client, backend, upload, download = self.client, self.backend, self.upload, self.download
        if upload.finished and download.finished and not (client.ready | backend.ready) & ERR:
            backend.close()
            client.close()
            return 0
        return cut(upload, download) + cut(download, upload)

    def abort(self) -> None:
        """Close both sides with RST, and give up what has not been passed on."""
        for flow in (self.upload, self.download):
            flow.drop()
            flow.source.abort()

    def _half_close(self) -> Cause:
        """Pass the end of the first flow on; return whose end it is. The other flow may be silent for less long."""
        loop = self.loop
        flow = self.upload if self.upload.finished else self.download
        flow.target.end()
        loop.current.wake_at(loop.now + self._half_closed_timeout)
        if flow.target.ready & ERR:
            loop.current.wake()  # to see the abort
        return "client-closed" if flow is self.upload else "backend-closed"

    def _silence(self) -> Cause | None:
        """The cause of the end, if no byte has moved for too long; else None, and the deadline is put off."""
        loop = self.loop
        half_closed = self.upload.finished or self.download.finished
        timeout = self._half_closed_timeout if half_closed else self.idle_timeout
        deadline = max(self.upload.moved_at, self.download.moved_at) + timeout
        if deadline <= loop.now:
            if not self._acknowledged():
                return self._cause_after(timeout)
            deadline = loop.now + timeout
        loop.current.wake_at(deadline)
        return None

    def _cause_after(self, timeout: float) -> Cause:
        return "half-close-timeout" if timeout < self.idle_timeout else "idle-timeout"

    def _acknowledged(self) -> bool:
        """Whether a peer has taken bytes from the kernel's buffers since the last call: slow is not idle."""
        unsent = self.client.unsent() + self.backend.unsent()
        changed = unsent != self._unsent
        self._unsent = unsent
        return changed

    async def _end_both(self, first: Cause) -> Cause:
        """Deliver what the side that has not ended has sent until now, then tell the other that nothing more comes.

        first: whose end it was. Returned if all went well; else why the relay ends.
        """
        loop, task = self.loop, self.loop.current
        flow = self.download if first == "client-closed" else self.upload
        source, target = flow.source, flow.target
        if not self.bounds:
            here = flow.held_back + source.unread()
            # If nothing is here, the source was not sending: the end comes at once. If it was, it may send for ever.
            enough = flow.total + (here + SENDING_MAX if here else 0)
            self.bounds = enough, loop.now + self._half_closed_timeout
        enough, latest = self.bounds
        while not target.ended:
            more = flow.pump()
            if (source.ready | target.ready) & ERR:
                return await self._deliver_before_abort()
            if flow.finished or flow.total >= enough:
                break
            if flow.waiting or source.ready & IN:
                if loop.now >= task.deadline and (cause := self._silence()):
                    return cause
            elif loop.now >= (until := min(flow.moved_at + PAUSE, latest)):
                break
            else:
                task.wake_at(until)
            if more:
                task.wake()
            await news()
        flow.drop()
        if not target.ended:
            target.end()
        return await self._let_go(flow) or first

    async def _let_go(self, flow: Flow) -> Cause | None:
        """Wait until the source of a flow, which may still send, has acknowledged what was sent to it.

        After the close, the kernel answers what comes with RST, and RST destroys what is not acknowledged.
        Both sides have been told the end. Returns None, or why the relay ends otherwise.
        """
        loop, task = self.loop, self.loop.current
        last, other = flow.source, flow.target
        waiting = -1
        deadline = inf
        look = FIRST_LOOK
        while not (last.ready | other.ready) & ERR:
            at_risk = last.at_risk() - last.ended
            # A peer that writes before it reads would never read if nobody took what it writes.
            wasted = flow.waste() if at_risk > 0 else 0
            if wasted == 0 and not last.aborted:
                last.discard()
                return None
            if at_risk != waiting:
                waiting = at_risk
                deadline = loop.now + self._half_closed_timeout
            elif loop.now >= deadline:
                return self._cause_after(self._half_closed_timeout)
            if wasted:
                task.wake()
            else:
                task.wake_at(min(loop.now + look, deadline))
                look = min(2 * look, LAST_LOOK)
            await news()  # the side may end by itself
        if other.aborted:
            return await self._deliver_before_abort()
        # The other side has its end already: there is no abort to pass on.
        return "client-aborted" if last is self.client else "backend-aborted"

    async def _deliver_before_abort(self) -> Cause:
        """Pass on what the aborted side had sent, and wait until the other has it: the later RST would destroy it.

        The wait ends when the other side has taken nothing for as long as a half-closed connection may be silent.
        """
        loop = self.loop
        cause: Cause
        if self.client.aborted:
            flow, other, cause = self.upload, self.download, "client-aborted"
        else:
            flow, other, cause = self.download, self.upload, "backend-aborted"
        other.drop()
        target = flow.target
        taken = -1
        deadline = inf
        look = FIRST_LOOK
        while not target.aborted:
            more = flow.pump()
            at_risk = target.at_risk()
            if flow.finished and not at_risk:
                break
            if flow.total - at_risk != taken:
                taken = flow.total - at_risk
                deadline = loop.now + self._half_closed_timeout
            elif loop.now >= deadline:
                break
            if more:
                await loop.yield_turn()
            elif flow.finished:
                await loop.sleep(look)
                look = min(2 * look, LAST_LOOK)
            else:
                loop.current.wake_at(deadline)
                await news()
        return cause


def resume(loop: Loop, pipes: Pipes, handed: Handed, descriptors: dict[int, int]) -> Relay:
    """The relay that was handed over by the process before, to `go_on`. It takes its own from the descriptors.

    descriptors: by their numbers in that process. If this fails, those that were taken are closed.
    """
    sides: list[Side] = []
    try:
        sides.append(client := resume_side(loop, handed["client"], descriptors))
        sides.append(backend := resume_side(loop, handed["backend"], descriptors))
        idle_timeout, half_close_timeout = handed.get("timeouts", (inf, inf))
        relay = Relay(loop, client, backend, pipes, idle_timeout, half_close_timeout, handed.get("half_close", True))
        relay._deadline = handed.get("deadline", inf)
        relay._unsent = handed.get("unsent", 0)
        relay._first = handed.get("first")
        relay.bounds = handed.get("bounds")
        for flow, name in ((relay.upload, "upload"), (relay.download, "download")):
            flow.resume(handed.get(name, {}), descriptors)
    except BaseException:
        for side in sides:
            side.abort()
        raise
    return relay
