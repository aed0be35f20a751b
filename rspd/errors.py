"""Why rspd cannot run."""


class StartError(Exception):
    """rspd cannot run. The text says why, in a line or several.

    exit_code: of sysexits(3), as the os module names them.
    errno: the system's reason, or 0.
    """

    def __init__(self, message: str, exit_code: int, errno: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.errno = errno
