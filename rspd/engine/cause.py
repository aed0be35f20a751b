"""Why a connection ended."""

from typing import Literal

Cause = Literal[
    "client-closed",  # both streams ended, the client's first
    "backend-closed",  # both streams ended, the backend's first
    "client-aborted",  # RST from the client, or the network lost it
    "backend-aborted",  # RST from the backend, or the network lost it
    "idle-timeout",  # no byte in either direction for idle_timeout
    "half-close-timeout",  # one stream had ended, and no byte came on the other for half_close_timeout
    "backend-refused",  # the backend's host answered, and nothing listens there
    "backend-unreachable",  # no way to the backend's host
    "backend-unknown",  # the backend's name has no address
    "connect-timeout",  # no backend was reached within connect_timeout
    "backend-down",  # its backend went down and on_down is abort; or all of them are, by their checks
    "queue-timeout",  # no backend was free within queue_timeout
    "loop",  # the way to the backend led back to the proxy
    "bad-header",  # no PROXY protocol header where accept_proxy expects one
    "header-timeout",  # no header, or only part of it, within accept_proxy_timeout
    "bad-head",  # what the client said first is not valid in its protocol
    "first-bytes-timeout",  # only part of that came within first_bytes_timeout, or nothing, and too many waited
    "no-route",  # no route is for such a client
    "drain-timeout",  # still open after drain_timeout, or at a second signal to end
    "handover-failed",  # it was handed over, and the next process could not go on with it
    "error",  # an unexpected error, logged with its traceback
]

# A client that is refused for one of these causes gets RST, unless there is an answer in its protocol.
UNSERVED: frozenset[Cause] = frozenset(
    {"loop", "bad-header", "header-timeout", "bad-head", "first-bytes-timeout", "no-route"}
)

# The client ended the connection for these, or said what it should not: no warning is needed.
OF_CLIENT: frozenset[Cause] = frozenset({"client-aborted", "bad-head", "first-bytes-timeout", "no-route"})

# A backend, or rspd itself, did not serve the client as it should. All other causes of failures are those of clients,
# of networks, or of what is configured.
OF_BACKENDS: frozenset[Cause] = frozenset(
    {
        "backend-aborted",
        "backend-refused",
        "backend-unreachable",
        "backend-unknown",
        "backend-down",
        "connect-timeout",
        "queue-timeout",
        "loop",
        "handover-failed",
        "error",
    }
)

# Both streams have ended. All other causes are failures, of whomever.
WELL: frozenset[Cause] = frozenset({"client-closed", "backend-closed"})
