"""What is answered at the control socket, and at the metrics."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rspd.admin.query import read_query
from rspd.admin.request import CONNECTIONS, METRICS, STATUS, Answer, Request
from rspd.admin.server import Server
from rspd.engine.loop import Loop, Task, news
from rspd.net.descriptors import Shortage
from rspd.observing.connections import Look, from_end
from rspd.observing.life import Life
from rspd.observing.pace import Pace
from rspd.observing.proxies import Layout, backend, layout, pools, proxies, routes
from rspd.observing.samples import Everyone, Sampler
from rspd.snapshot import Snapshot, as_json

if TYPE_CHECKING:
    from rspd.admin.metrics import Exposition

# How many backends, or entries of an answer, are made in one turn of the loop: less than a millisecond of work. And how
# many proxies: each may have counts of many backends.
SLICE, LARGE = 20, 2

# How often a snapshot is begun at most. It is begun again if a reload came meanwhile.
TRIES = 3

T = TypeVar("T")

JSON = "application/json"


class Scrape(NamedTuple):
    """Somebody who waits for the metrics. outcomes: the text, or why there is none, once it is made."""

    request: Request
    task: Task
    outcomes: list[tuple[str, bytes] | Exception]


class Answers:
    """Who answers: `control` and `metrics` are the servers.

    exposition: makes the text of the metrics; set before there are listeners for it.
    sampler: takes samples as long as somebody could look.
    """

    exposition: "Exposition"

    def __init__(self, loop: Loop, shortage: Shortage, proxies: Everyone, life: Life, watchers: set[Task]) -> None:
        """As for `Desk`."""
        self._loop = loop
        self._proxies = proxies
        self._life = life
        self._pace = Pace(loop)
        self._scrapes: list[Scrape] = []  # those that wait for the next text
        self._making = False
        self.sampler = Sampler(loop, self._pace, proxies, watchers)
        self.control = Server(loop, shortage, self._answer_control)
        self.metrics = Server(loop, shortage, self._answer_metrics)

    # Answers

    async def _answer_control(self, request: Request) -> Answer:
        if request.path == STATUS:
            return Answer(200, JSON, self._status(await self._snapshot(request)))
        if request.path == CONNECTIONS:
            return await self._answer_connections(request)
        return Answer.error(404, f"expected {STATUS} or {CONNECTIONS}, found {request.path:.80}")

    async def _answer_connections(self, request: Request) -> Answer:
        try:
            query = read_query(request.query)
        except ValueError as error:
            return Answer.error(400, f"expected a query for connections: {error}")
        await self._pace.slice(request.gone)
        look = Look(self._loop, self._pace, self._proxies, self._life, self.sampler)
        found = await look.first(query)
        process = as_json(await self._life.snapshot())
        begin = f'{{"process":{process},"matching":{look.matching},"connections":['
        return Answer(200, JSON, self._listed(begin, found, "]}\n", SLICE))

    async def _answer_metrics(self, request: Request) -> Answer:
        if request.path != METRICS:
            return Answer.error(404, f"expected {METRICS}, found {request.path:.80}")
        scrape = Scrape(request, self._loop.current, [])
        self._scrapes.append(scrape)
        if not self._making:
            self._making = True
            self._loop.spawn(self._make_texts(), self._all_made)
        while not scrape.outcomes:
            if request.gone():
                raise ConnectionAbortedError
            await news()
        outcome = scrape.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        kind, text = outcome
        return Answer(200, kind, (text,))

    async def _make_texts(self) -> None:
        """One text after another as long as somebody waits. All who wait when one is begun share it.

        Workers may be slow. If each request had a text of its own, and more came than are made, all would be too late.
        """
        while waiting := [scrape for scrape in self._scrapes if not scrape.request.gone()]:
            self._scrapes.clear()
            outcome = await self._texts({scrape.request.accept: scrape.request for scrape in waiting})
            for scrape in waiting:
                scrape.outcomes.append(outcome if isinstance(outcome, Exception) else outcome[scrape.request.accept])
                scrape.task.wake()
        self._scrapes.clear()

    def _all_made(self, _: Task) -> None:
        self._making = False

    async def _texts(self, requests: Mapping[str, Request]) -> Mapping[str, tuple[str, bytes]] | Exception:
        """The text for each header Accept, or why there is none."""
        exposition, task = self.exposition, self._loop.current
        outcomes = list[Mapping[str, tuple[str, bytes]] | Exception]()

        def finish(outcome: Mapping[str, tuple[str, bytes]] | Exception) -> None:
            outcomes.append(outcome)
            task.wake()

        try:
            own = await self._snapshot(next(iter(requests.values()))._replace(gone=lambda: False))
            # Text for many backends takes a while, and so do workers: this is not for the loop.
            self._loop.wakeups.run_in_thread(lambda: exposition.texts(own, requests), finish)
        except Exception as error:
            return error
        while not outcomes:
            await news()
        return outcomes[0]

    # Snapshots

    async def _status(self, snapshot: Snapshot) -> AsyncIterator[bytes]:
        begin = f'{{"process":{as_json(snapshot.process)}'
        lists = [list[object](reversed(entries)) for entries in snapshot[1:]]
        del snapshot  # its entries are given up one by one, too
        for name, entries in zip(Snapshot._fields[1:], lists, strict=True):
            most = LARGE if name == "proxies" else SLICE
            async for part in self._listed(f'{begin},"{name}":[', from_end(entries), "]", most):
                yield part
            begin = ""
        yield b"}\n"

    async def _snapshot(self, request: Request) -> Snapshot:
        await self._pace.slice(request.gone)
        await self.sampler.count_bytes()
        for _ in range(TRIES):
            seen = layout(self._proxies)
            found = await self._seen(seen)
            if layout(self._proxies) == seen:
                break
        return found

    async def _seen(self, seen: Layout) -> Snapshot:
        """A snapshot over many turns. If a reload comes meanwhile, its parts are of before and after."""
        found = await self._made(pools(seen), SLICE)
        each = (backend(pool, one, self._loop.now) for pool, backends in found for one in backends)
        return Snapshot(
            await self._life.snapshot(),
            await self._made(proxies(self._proxies, self.sampler, self._loop), LARGE),
            await self._made(routes(seen), SLICE),
            tuple(pool for pool, _ in found),
            await self._made(each, SLICE),
        )

    async def _made(self, entries: Iterable[T], most: int) -> tuple[T, ...]:
        """All of them, so many in each turn."""
        found: list[T] = []
        left = iter(entries)
        while part := list(islice(left, most)):
            found += part
            await self._pace.slice()
        return tuple(found)

    async def _listed(self, begin: str, entries: Iterable[object], end: str, most: int) -> AsyncIterator[bytes]:
        """A list in JSON, between `begin` and `end`, so many entries in each turn; fewer if they have long lists."""
        yield begin.encode()
        left = _parts(entries)
        while part := "".join(islice(left, most)):
            yield part.encode()
            await self._pace.slice()
        yield end.encode()


def _parts(entries: Iterable[Any]) -> Iterator[str]:
    """Named tuples in JSON, with commas between them, in parts: one of each, or some of one that has long lists."""
    comma = ""
    for entry in entries:
        lists = [field for field in entry if type(field) is tuple]
        if sum(map(len, lists)) <= SLICE:
            yield comma + as_json(entry)
        else:
            yield from _cut(entry, comma)
        comma = ","


def _cut(entry: Any, comma: str) -> Iterator[str]:
    """A named tuple in JSON, after a comma, in parts that have at most SLICE entries of its lists."""
    text = comma + "{"
    for name, field in zip(entry._fields, entry, strict=True):
        text += f'{"" if text[-1:] == "{" else ","}"{name}":'
        if type(field) is not tuple:
            text += as_json(field)
            continue
        text += "["
        for place in range(0, len(field), SLICE):
            yield text + ",".join(map(as_json, field[place : place + SLICE]))
            text = "," if place + SLICE < len(field) else ""
        text += "]"
    yield text + "}"
