"""Which listeners stay, and which are opened and closed, when others are wanted."""

import errno
import logging
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from rspd.net.address import Address, SocketAddress, place_of
from rspd.net.listener import Kept, Listener, ListenError, close_all, kept_listener, open_listeners

log = logging.getLogger(__name__)


class Binding(NamedTuple):
    """How a configured address is to be listened on: what it stands for, and the options of its proxy.

    private: as for `open_listeners`.
    optional: whether rspd goes on, with a line in the log, if nobody can be listened to there.
    """

    where: Sequence[SocketAddress]
    backlog: int
    reuse_port: bool = False
    private: bool = False
    optional: bool = False


def replace_listeners(
    old: Sequence[Listener], wanted: Mapping[Address, Binding], kept: Kept | None = None
) -> list[Listener]:
    """Listeners for the wanted addresses. Old listeners that are still wanted stay; the other old ones are closed.

    Where the file of a unix socket is lost, a new one is opened in its place. If that cannot be, the old one stays.
    Listeners from systemd always stay: rspd could not get a closed one back.
    kept: sockets of the process before. Where they are wanted, each is taken once; the others are closed.
    No old listener may be watched meanwhile. Raises ListenError; then old listeners and kept sockets are as they were.
    """
    kept = kept or {}
    adopted = [listener for listener in old if listener.passed is not None]
    bound = [listener for listener in old if listener.passed is None]
    leaving = [listener for listener in bound if listener.address not in wanted]
    still_wanted = [listener for listener in bound if listener.address in wanted]
    lost = [listener for listener in still_wanted if listener.lost]
    staying = [listener for listener in still_wanted if listener not in lost]
    known = {listener.address for listener in staying}
    coming = {address: binding for address, binding in wanted.items() if address not in known}
    leaving += _left_over(kept, coming)
    replaced = {listener.address for listener in lost}
    needed = {at: binding for at, binding in coming.items() if not (binding.optional or at in replaced)}
    opened = _open_in_place_of(leaving, needed, kept)
    for listener in leaving:
        listener.close()
    for address, binding in coming.items():
        if address not in needed:
            opened += _open_if_possible(address, binding, kept, opened)
    _close_surplus(kept, opened)
    staying += _without_successor(lost, {listener.address for listener in (*staying, *opened)})
    _go_on(staying, wanted)
    return adopted + staying + opened


def _left_over(kept: Kept, coming: Mapping[Address, Binding]) -> list[Listener]:
    """Listeners on those kept sockets that nobody wants."""
    places = {(where.family, place_of(where.address)) for binding in coming.values() for where in binding.where}
    return [kept_listener(sock) for place, here in kept.items() if place not in places for sock in here]


def _close_surplus(kept: Kept, opened: Sequence[Listener]) -> None:
    """Close those kept sockets that are open still, and that nobody has taken.

    The kernel would go on giving them a share of the clients of their port. Who waits there is reset.
    """
    known = {-1, *(listener.fd for listener in opened)}
    for sock in (sock for here in kept.values() for sock in here if sock.fileno() not in known):
        kept_listener(sock).close()


def _without_successor(lost: Sequence[Listener], successors: Container[Address]) -> list[Listener]:
    """Those that stay of the lost ones. They are closed where there is another one, unless clients wait there."""
    staying = []
    for listener in lost:
        if listener.address in successors and listener.waiting() == 0:
            listener.close()
        else:
            staying.append(listener)
    return staying


def _go_on(listeners: Sequence[Listener], wanted: Mapping[Address, Binding]) -> None:
    for listener in listeners:
        binding = wanted[listener.address]
        listener.listen(binding.backlog)
        if binding.reuse_port:
            listener.share_port()


def _open_in_place_of(leaving: Sequence[Listener], coming: Mapping[Address, Binding], kept: Kept) -> list[Listener]:
    """New listeners. Old ones in their way stop listening. Raises ListenError; then the old ones listen again."""
    try:
        return _open_all(coming, kept)
    except ListenError as error:
        ports = {address.port for address in coming} - {0}
        in_the_way = [listener for listener in leaving if listener.address.port in ports]
        if error.errno != errno.EADDRINUSE or not in_the_way:
            raise
        # An old listener may be in the way: 8080 is in the way of 127.0.0.1:8080. A client that comes now is refused.
        for listener in in_the_way:
            listener.rest()
        try:
            return _open_all(coming, kept)
        except ListenError:
            for listener in in_the_way:
                listener.listen(listener.backlog)
            raise


def _open_all(bindings: Mapping[Address, Binding], kept: Kept) -> list[Listener]:
    opened: list[Listener] = []
    taken: set[int] = set()
    try:
        for address, binding in bindings.items():
            listeners = _open(address, binding, kept, taken)
            opened += listeners
            taken.update(listener.fd for listener in listeners)
    except ListenError:
        close_all(opened, kept)
        raise
    return opened


def _open_if_possible(address: Address, binding: Binding, kept: Kept, others: Sequence[Listener]) -> list[Listener]:
    try:
        return _open(address, binding, kept, {listener.fd for listener in others})
    except ListenError as error:
        what = "nobody can look at this process" if binding.optional else "the file of a listening socket is gone"
        log.warning("%s, %s", what, error)
        return []


def _open(address: Address, binding: Binding, kept: Kept, taken: Container[int]) -> list[Listener]:
    where, backlog, reuse_port, private, _ = binding
    return open_listeners(address, where, backlog, reuse_port, kept, private, taken)
