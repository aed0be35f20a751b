"""A relay that is handed over, at any step and any number of times: its peers cannot tell."""

from __future__ import annotations

import os
import socket
import time
from math import inf
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rspd.engine.cause import Cause
from rspd.engine.flow import Flow
from rspd.engine.loop import Loop
from rspd.engine.pipes import Pipes
from rspd.engine.relay import Relay
from rspd.engine.relay import resume as resume_relay
from rspd.engine.side import Handed, Side, UnixSide
from rspd.engine.side import resume as resume_side
from rspd.running.document import read, write
from tests.support import PATIENCE, FakeClock, is_reset, open_descriptors, reset, tcp_pair

BUFFER = 1 << 14  # bytes that the kernel holds on each way, or some more: readers that do not read are felt soon
CONTENT = bytes(range(251)) * 4000  # of no round length: a lost or doubled piece shows


class Peer:
    """A client or a backend: what it has sent and received, and how its stream ended: `end`, `reset`, or not yet."""

    def __init__(self, sock: socket.socket, at: int) -> None:
        self.sock = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        sock.setblocking(False)
        self._at = at
        self.sent = 0
        self.received = bytearray()
        self.ending = ""  # how it ended its own stream
        self.refused = False  # it sent, and nobody takes it any more
        self.finished = False  # it ended before it was reset
        self.end = ""

    @property
    def content(self) -> bytes:
        """What it has sent so far."""
        return CONTENT[self._at : self._at + self.sent]

    def send(self, size: int) -> None:
        """Send as much of this as there is room for."""
        start = self._at + self.sent
        if not self.ending and start + size <= len(CONTENT):
            try:
                self.sent += self.sock.send(CONTENT[start : start + size])
            except BlockingIOError:
                pass
            except ConnectionResetError:
                self.end = "reset"
            except BrokenPipeError:
                self.refused = True

    def receive(self, size: int) -> None:
        """Receive as much of this as there is."""
        while size > 0 and not self.end and self.ending != "reset":
            try:
                data = self.sock.recv(size)
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.end = "reset"
                return
            self.received += data
            size -= len(data)
            if not data:
                self.end = "end"

    def finish(self) -> None:
        """End the stream."""
        if not self.ending:
            self.ending = "end"
            self.finished = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # reset

    def abort(self) -> None:
        """Reset the connection."""
        if self.ending != "reset":
            self.ending = "reset"
            reset(self.sock)


class Scene:
    """A client, a relay, and a backend. `cause`, once the relay has ended."""

    def __init__(self, unix: bool, half_close: bool, pipes: int) -> None:
        self._unix = unix
        self._pipes = pipes
        pair = socket.socketpair if unix else tcp_pair
        (near, far), (near_backend, far_backend) = pair(), pair()
        for sock in (near, near_backend, far, far_backend):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.client, self.backend = Peer(far, 0), Peer(far_backend, len(CONTENT) // 2)
        self._half_close = half_close
        self._first: tuple[socket.socket, socket.socket] | None = (near, near_backend)
        self._handed: Handed = {}
        self._descriptors: dict[int, int] = {}
        self.cause: Cause | None = None
        self.lost = 0
        self.handovers = 0

    def play(self, steps: list[tuple[str, int]]) -> None:
        """Take these steps, up to the end of the relay, with a loop of its own for what comes before each handover."""
        rest = [*steps, ("finish", 0)]
        while rest:
            with Loop() as loop:
                rest = loop.run(self._act(loop, rest))

    async def _act(self, loop: Loop, steps: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Take steps up to the next handover. Returns those that are left."""
        pipes = Pipes(self._pipes)
        relay = self._relay(loop, pipes)
        task = loop.spawn(self._serve(relay))
        for count, (who, size) in enumerate(steps, 1):
            if who == "handover":
                if task.done:
                    continue
                self._hand_over(relay)
                loop.abandon()
                return steps[count:]
            if who == "finish":
                deadline = time.monotonic() + PATIENCE
                self.client.finish()
                self.backend.finish()
                while not (task.done and self._both_ended()):
                    assert time.monotonic() < deadline, (self.client.__dict__, self.backend.__dict__, self.cause)
                    self.client.receive(1 << 20)
                    self.backend.receive(1 << 20)
                    await loop.sleep(0.0005)
            else:
                self._step(who, size)
                await loop.yield_turn()
                await loop.yield_turn()
        pipes.close()
        assert (pipes.made, pipes.in_memory) == (0, 0)
        return []

    def _both_ended(self) -> bool:
        return all(peer.end or peer.ending == "reset" for peer in (self.client, self.backend))

    def _step(self, who: str, size: int) -> None:
        name, _, what = who.partition(" ")
        peer: Any = self.client if name == "client" else self.backend
        getattr(peer, what)(*([size] if what in ("send", "receive") else []))

    def _relay(self, loop: Loop, pipes: Pipes) -> Relay:
        if not self._first:
            return resume_relay(loop, pipes, self._handed["relay"], self._descriptors)
        sides = []
        for sock in self._first:
            own = socket.SocketType(sock.family, sock.type | socket.SOCK_NONBLOCK, 0, sock.detach())
            own.setblocking(False)
            sides.append(UnixSide(loop, own) if self._unix else Side(loop, own))
        self._first = None
        client, backend = sides
        return Relay(loop, client, backend, pipes, inf, PATIENCE, self._half_close)

    async def _serve(self, relay: Relay) -> None:
        relay.client.watch()
        relay.backend.watch()
        if self.handovers:
            self.cause = await relay.go_on()
        else:
            self.cause = await relay.run()
        self.lost = relay.close()

    def _hand_over(self, relay: Relay) -> None:
        """As between two processes: descriptors are copied, all else goes through the document."""
        self.handovers += 1
        self._handed = read(b"".join(write({"relay": relay.hand_over()})))
        sockets = [relay.client.sock, relay.backend.sock]
        own = [sock.fileno() for sock in sockets]
        pipe_ends = relay.upload.pipe_descriptors + relay.download.pipe_descriptors
        self._descriptors = {number: os.dup(number) for number in own + pipe_ends}
        for sock in sockets:
            sock.close()
        for fd in pipe_ends:
            os.close(fd)

    def close(self) -> None:
        self.client.sock.close()
        self.backend.sock.close()


SIZES = st.sampled_from([1, 999, 40_000, 66_000, 200_000])
STEP = st.one_of(
    st.tuples(st.sampled_from(["client send", "backend send", "client receive", "backend receive"]), SIZES),
    st.tuples(st.sampled_from(["client finish", "backend finish"]), st.just(0)),
    st.tuples(st.just("handover"), st.just(0)),
)
ABORT = st.tuples(st.sampled_from(["client abort", "backend abort"]), st.just(0))

FULL = [("client send", 200_000)] * 8


def played(steps: list[tuple[str, int]], unix: bool, half_close: bool, pipes: int) -> Scene:
    """The scene after these steps, closed. Nothing is left open."""
    before = open_descriptors()
    scene = Scene(unix, half_close, pipes)
    try:
        scene.play(steps)
    finally:
        scene.close()
    assert open_descriptors() == before
    return scene


@example([*FULL, ("handover", 0), ("handover", 0), ("backend receive", 999), ("handover", 0)], False, 2)
@example([*FULL, ("handover", 0), ("client finish", 0), ("handover", 0)], False, 0)
@example([("client finish", 0), ("handover", 0), ("backend send", 200_000), ("handover", 0)], True, 2)
@given(st.lists(STEP, max_size=24), st.booleans(), st.sampled_from([0, 2]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bytes_and_ends_are_those_of_a_relay_that_was_not_handed_over(
    steps: list[tuple[str, int]], unix: bool, pipes: int
) -> None:
    scene = played(steps, unix, True, pipes)
    client, backend = scene.client, scene.backend
    assert bytes(backend.received) == client.content
    assert bytes(client.received) == backend.content
    assert (client.end, backend.end) == ("end", "end")
    assert scene.cause in ("client-closed", "backend-closed")
    assert scene.lost == 0


@given(st.lists(STEP, max_size=16), ABORT, st.lists(st.one_of(STEP, ABORT), max_size=8), st.sampled_from([0, 2]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_abort_stays_an_abort_whenever_the_relay_is_handed_over(
    before: list[tuple[str, int]], abort: tuple[str, int], after: list[tuple[str, int]], pipes: int
) -> None:
    scene = played([*before, abort, *after], False, True, pipes)
    for one, other in ((scene.client, scene.backend), (scene.backend, scene.client)):
        assert one.content.startswith(bytes(other.received))
        if one.ending == "reset" and other.end == "end":
            assert one.finished, "what was cut short must not look complete"
            assert bytes(other.received) == one.content


@given(st.lists(STEP, max_size=24), st.booleans(), st.sampled_from([0, 2]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_without_half_close_the_first_stream_arrives_whole_and_the_other_as_far_as_it_went(
    steps: list[tuple[str, int]], unix: bool, pipes: int
) -> None:
    scene = played(steps, unix, False, pipes)
    client, backend = scene.client, scene.backend
    assert client.content.startswith(bytes(backend.received))
    assert backend.content.startswith(bytes(client.received))
    if scene.cause == "client-closed":
        assert bytes(backend.received) == client.content
    elif scene.cause == "backend-closed":
        assert bytes(client.received) == backend.content
    assert {client.end, backend.end} <= {"end", "reset"}


@pytest.mark.parametrize("who", ["client", "backend"])
def test_an_abort_whose_error_was_read_is_still_one_in_the_next_process(who: str) -> None:
    other = {"client": "backend", "backend": "client"}[who]
    # The relay has nothing to deliver, so it reads the error. It waits, since the other has not acknowledged all.
    sent = [(f"{who} send", 999)] * 45
    scene = played(
        [*sent, (f"{who} abort", 0), (f"{other} receive", 1), ("handover", 0), ("handover", 0)], False, True, 2
    )
    assert scene.handovers == 2
    assert scene.cause == f"{who}-aborted"
    assert getattr(scene, other).end == "reset"
    assert bytes(getattr(scene, other).received) == getattr(scene, who).content


@pytest.mark.parametrize("known", [True, False])
def test_a_broken_connection_is_told_from_one_that_has_ended(known: bool) -> None:
    """known: whether the process before has noted it; if not, the kernel knows."""
    near, far = tcp_pair()
    with near, Loop() as loop:
        reset(far)
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        handed = {"fd": 9, "family": int(socket.AF_INET), "aborted": known}
        side = resume_side(loop, handed, {9: os.dup(near.fileno())})
        assert side.aborted
        side.close()


def test_without_half_close_a_stream_that_goes_on_is_given_its_time_in_the_next_process_too() -> None:
    sent = [*[("backend send", 200_000)] * 6, ("client finish", 0)]
    received = [("client receive", 200_000)] * 40
    scene = played([*sent, *received, ("handover", 0), ("backend send", 999)], True, False, 2)
    assert (scene.cause, scene.backend.refused) == ("client-closed", False)
    assert bytes(scene.client.received) == scene.backend.content


@pytest.mark.parametrize("ended", [False, True])
def test_a_silence_goes_on_in_the_next_process(ended: bool) -> None:
    clock = FakeClock()
    near, far = tcp_pair()
    near_backend, far_backend = tcp_pair()
    with far, far_backend:
        if ended:
            far.shutdown(socket.SHUT_WR)
        with Loop(clock) as loop:
            relay, done = relaying(loop, Relay(loop, *sides_of(loop, near, near_backend), Pipes(2), 60.0, 30.0))

            async def wait() -> Handed:
                await loop.yield_turn()
                await loop.yield_turn()
                clock.advance(29.0 if ended else 59.0)
                await loop.yield_turn()
                loop.abandon()
                return relay.hand_over()

            handed = loop.run(wait())
        assert not done
        with Loop(clock) as loop:
            numbers = {number: os.dup(number) for number in (relay.client.fd, relay.backend.fd)}
            relay.client.sock.close()
            relay.backend.sock.close()
            relay, done = relaying(loop, resume_relay(loop, Pipes(2), handed, numbers), first=False)

            async def wait_on() -> None:
                await loop.yield_turn()
                assert not done
                # An end that is not acknowledged yet counts as bytes on the way: it gives the time once more.
                for _ in range(1 + ended):
                    clock.advance(30.0 if ended else 1.0)
                    await loop.yield_turn()
                    await loop.yield_turn()

            loop.run(wait_on())
            assert done == ["half-close-timeout" if ended else "idle-timeout"]
            relay.close()
        # The backend has been told the end: an end is all that it sees.
        assert [is_reset(far), is_reset(far_backend)] == [True, not ended]


def test_bytes_that_were_taken_out_of_a_pipe_count_as_memory_in_the_next_process() -> None:
    near, far = tcp_pair()
    near_backend, far_backend = tcp_pair()
    with far, far_backend, Loop() as loop:
        pipes = Pipes(2)
        flow = Flow(*sides_of(loop, near, near_backend), pipes)
        flow.resume({"held": b"12345", "from_pipe": 5}, {})
        assert pipes.in_memory == 5
        flow.pump()
        assert far_backend.recv(9) == b"12345"
        assert pipes.in_memory == 0
        flow.source.close()
        flow.target.close()


def sides_of(loop: Loop, *socks: socket.socket) -> tuple[Side, Side]:
    """The sides of these sockets, which they own from now on."""
    client, backend = (
        Side(loop, socket.SocketType(sock.family, sock.type | socket.SOCK_NONBLOCK, 0, sock.detach())) for sock in socks
    )
    for side in (client, backend):
        side.sock.setblocking(False)
    return client, backend


def relaying(loop: Loop, relay: Relay, first: bool = True) -> tuple[Relay, list[Cause]]:
    """The relay at work; and its cause, once it has ended."""
    done: list[Cause] = []

    async def serve() -> None:
        relay.client.watch()
        relay.backend.watch()
        done.append(await (relay.run() if first else relay.go_on()))

    loop.spawn(serve())
    return relay, done
