"""Room for the descriptors that a configuration needs, within the limits of the process."""

from __future__ import annotations

import errno
import os

from rspd.errors import StartError
from rspd.net.address import literal
from rspd.net.descriptors import TooFewError, reserve
from rspd.settings import Config


def make_room(config: Config, listeners: int) -> int:
    """Make room for the descriptors that a configuration needs. Returns how many pipes there is room for."""
    connections = sum(proxy.max_connections for proxy in config.proxies)
    # Each check of a backend has a socket; each lookup has a socket or a file.
    checks = sum(len(proxy.backends) for proxy in config.proxies if proxy.health)
    names = sum(not literal(backend.address) for proxy in config.proxies for backend in proxy.backends)
    try:
        return reserve(connections, listeners + checks + names)
    except TooFewError as error:
        advice = f"lower it to {error.fitting} or raise" if error.fitting > 0 else "raise"
        several = "" if len(config.proxies) == 1 else " (of all proxies together)"
        raise StartError(
            f"max_connections {connections}{several} needs {error.needed} descriptors, and the limit is {error.limit}: "
            f"{advice} the limit (LimitNOFILE= in the unit, ulimit -Hn in a shell)",
            os.EX_OSERR,
            errno.EMFILE,
        ) from None
