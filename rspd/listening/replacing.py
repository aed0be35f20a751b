"""Which listeners stay, and which are opened and closed, when others are wanted."""

import errno
import logging
from collections.abc import Mapping, Sequence
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

    Listeners from systemd always stay: rspd could not get a closed one back.
    kept: sockets of the process before. Where they are wanted, they are taken; the others are closed.
    No old listener may be watched meanwhile. Raises ListenError; then old listeners and kept sockets are as they were.
    """
    kept = kept or {}
    adopted = [listener for listener in old if listener.passed is not None]
    bound = [listener for listener in old if listener.passed is None]
    staying = [listener for listener in bound if listener.address in wanted]
    leaving = [listener for listener in bound if listener.address not in wanted]
    known = {listener.address for listener in bound}
    coming = {address: binding for address, binding in wanted.items() if address not in known}
    places = {(where.family, place_of(where.address)) for binding in coming.values() for where in binding.where}
    leaving += [kept_listener(sock) for place, sock in kept.items() if place not in places]
    needed = {address: binding for address, binding in coming.items() if not binding.optional}
    opened = _open_in_place_of(leaving, needed, kept)
    for listener in leaving:
        listener.close()
    for address in coming.keys() - needed:
        opened += _open_if_possible(address, coming[address], kept)
    for listener in staying:
        binding = wanted[listener.address]
        listener.listen(binding.backlog)
        if binding.reuse_port:
            listener.share_port()
    return adopted + staying + opened


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
    try:
        for address, binding in bindings.items():
            opened += _open(address, binding, kept)
    except ListenError:
        close_all(opened, kept)
        raise
    return opened


def _open_if_possible(address: Address, binding: Binding, kept: Kept) -> list[Listener]:
    try:
        return _open(address, binding, kept)
    except ListenError as error:
        log.warning("nobody can look at this process, %s", error)
        return []


def _open(address: Address, binding: Binding, kept: Kept) -> list[Listener]:
    where, backlog, reuse_port, private, _ = binding
    return open_listeners(address, where, backlog, reuse_port, kept, private)
