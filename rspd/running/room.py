"""Room for the descriptors that a configuration needs, within the limits of the process."""

from __future__ import annotations

import errno
import os
import resource

from rspd.engine.pipes import PIPES_MAX
from rspd.errors import StartError
from rspd.net.address import literal
from rspd.settings import Config

# Descriptors besides the connections': standard ones, loop, log, systemd, pid file, name lookups, the file at a
# reload, some to spare.
OWN_DESCRIPTORS = 24


def reserve_descriptors(config: Config, listeners: int) -> int:
    """Make room for the connections of all proxies. If needed, raise the soft limit to the hard limit.

    Returns how many pipes there is room for. Raises StartError if there is none for the connections.
    """
    connections = sum(proxy.max_connections for proxy in config.proxies)
    # Each check of a backend has a socket; each lookup has a socket or a file.
    checks = sum(len(proxy.backends) for proxy in config.proxies if proxy.health)
    names = sum(not literal(backend.address) for proxy in config.proxies for backend in proxy.backends)
    own = OWN_DESCRIPTORS + listeners + checks + names
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * connections + own
    if needed > hard:
        fitting = (hard - own) // 2
        advice = f"lower it to {fitting} or raise" if fitting > 0 else "raise"
        several = "" if len(config.proxies) == 1 else " (of all proxies together)"
        raise StartError(
            f"max_connections {connections}{several} needs {needed} descriptors, and the limit is {hard}: "
            f"{advice} the limit (LimitNOFILE= in the unit, ulimit -Hn in a shell)",
            os.EX_OSERR,
            errno.EMFILE,
        )
    if needed + 2 * PIPES_MAX > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(PIPES_MAX, (soft - needed) // 2)
