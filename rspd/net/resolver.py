"""Names looked up off the loop."""

from __future__ import annotations

from rspd.engine.loop import Loop, Task
from rspd.net.address import Address, SocketAddress, at_port, literal, resolve
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
    """Looks names up in threads. For each host, one lookup runs at a time, however many tasks ask for whatever port."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        # By host. The answers have no port.
        self._answers: dict[str, tuple[float, list[SocketAddress]]] = {}
        self._under_way: dict[str, Lookup] = {}

    async def look_up(self, address: Address, deadline: float, given_up: GivenUp | None = None) -> list[SocketAddress]:
        """The socket addresses of an address; at once if it names no host, or was looked up just now.

        given_up: called whenever the task is woken; if it returns True, the wait for the answer ends.
        Raises TimeoutError at the deadline (the loop's time), another OSError if the name has no address, or if it is
        given up.
        """
        if not address.host or literal(address):
            return resolve(address)  # no name server is asked
        when, answer = self._answers.get(address.host, (0.0, []))
        if not answer or self._loop.now - when >= ANSWER_LIFE:
            answer = await self._ask(address.host, deadline, given_up)
        return [at_port(where, address.port) for where in answer]

    async def _ask(self, host: str, deadline: float, given_up: GivenUp | None) -> list[SocketAddress]:
        lookup = self._under_way.get(host) or self._start(host)
        task = self._loop.current
        lookup.waiting[task] = None
        try:
            while lookup.outcome is None:
                late = f"no answer to the lookup of {host}"
                await wait(self._loop, deadline, late, given_up, "nobody waits for the name any more")
        finally:
            lookup.waiting.pop(task, None)
        if isinstance(lookup.outcome, Exception):
            raise lookup.outcome
        return lookup.outcome

    def _start(self, host: str) -> Lookup:
        lookup = Lookup()

        def finish(outcome: list[SocketAddress] | Exception) -> None:
            del self._under_way[host]
            lookup.outcome = outcome
            if not isinstance(outcome, Exception):
                self._answers[host] = (self._loop.now, outcome)
            for task in lookup.waiting:
                task.wake()

        try:
            self._loop.wakeups.run_in_thread(lambda: resolve(Address(host)), finish)
        except RuntimeError as error:
            raise OSError(f"{host} cannot be looked up: {error}") from None
        self._under_way[host] = lookup
        return lookup
