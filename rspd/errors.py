"""Why rspd cannot run, or cannot do what a file says."""

from collections.abc import Sequence


class ConfigError(Exception):
    """What is wrong with a configuration: `errors` has a line for each, with place, key, expected and found."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class StartError(Exception):
    """rspd cannot run. The text says why, in a line or several.

    exit_code: of sysexits(3), as the os module names them.
    errno: the system's reason, or 0.
    """

    def __init__(self, message: str, exit_code: int, errno: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.errno = errno
