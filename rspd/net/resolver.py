"""Names looked up off the loop."""

from __future__ import annotations

from rspd.engine.loop import Loop, Task
from rspd.net.address import Address, SocketAddress, literal, resolve
from rspd.net.waiting import GivenUp, wait

# Seconds for which an answer is used again. Short enough that nobody waits for a change, long enough that a busy
# proxy does not ask for every connection.
ANSWER_LIFE = 1.0


class Lookup:
    """A lookup under way: who waits for it, and then what came of it."""

    def __init__(self) -> None:
        self.waiting: dict[Task, None] = {}  # in the order in which they came
        self.outcome: list[SocketAddress] | Exception | None = None


class Resolver:
    """Looks names up in threads. For each name, one lookup runs at a time, however many tasks ask for the name."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._answers: dict[Address, tuple[float, list[SocketAddress]]] = {}
        self._under_way: dict[Address, Lookup] = {}

    async def look_up(self, address: Address, deadline: float, given_up: GivenUp | None = None) -> list[SocketAddress]:
        """The socket addresses of an address; at once if it names no host, or was looked up just now.

        given_up: called whenever the task is woken; if it returns True, the wait for the answer ends.
        Raises TimeoutError at the deadline (the loop's time), another OSError if the name has no address, or if it is
        given up.
        """
        if not address.host or literal(address):
            return resolve(address)  # no name server is asked
        when, answer = self._answers.get(address, (0.0, []))
        if answer and self._loop.now - when < ANSWER_LIFE:
            return answer
        lookup = self._under_way.get(address) or self._start(address)
        task = self._loop.current
        lookup.waiting[task] = None
        try:
            while lookup.outcome is None:
                late = f"no answer to the lookup of {address.host}"
                await wait(self._loop, deadline, late, given_up, "nobody waits for the name any more")
        finally:
            lookup.waiting.pop(task, None)
        if isinstance(lookup.outcome, Exception):
            raise lookup.outcome
        return lookup.outcome

    def _start(self, address: Address) -> Lookup:
        lookup = Lookup()

        def finish(outcome: list[SocketAddress] | Exception) -> None:
            del self._under_way[address]
            lookup.outcome = outcome
            if not isinstance(outcome, Exception):
                self._answers[address] = (self._loop.now, outcome)
            for task in lookup.waiting:
                task.wake()

        try:
            self._loop.wakeups.run_in_thread(lambda: resolve(address), finish)
        except RuntimeError as error:
            raise OSError(f"{address.host} cannot be looked up: {error}") from None
        self._under_way[address] = lookup
        return lookup
