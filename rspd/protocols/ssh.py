"""The first line of SSH, which tells its version. Source: RFC 4253, 4.2 and 5.1."""

from rspd.protocols.first import UNKNOWN, Said, pattern

_STARTS = (b"SSH-2.0-", b"SSH-1.99-")
_VERSION_1 = rb"SSH-1\.\d{1,3}-"
_VERSION_1_BEGUN = rb"SSH-1\.\d{0,3}"


def read(data: bytes, _: int = 0) -> Said | None:
    """Whether a client speaks SSH; as for a reader. A client that waits for the server's line says nothing."""
    if data.startswith(_STARTS) or pattern(_VERSION_1).match(data):
        return Said("ssh")
    begun = any(start.startswith(data) for start in _STARTS) or pattern(_VERSION_1_BEGUN).fullmatch(data)
    return None if begun else UNKNOWN
