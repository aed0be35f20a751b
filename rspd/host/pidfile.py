"""The pid file: one process at a time, and nobody else's file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from rspd.errors import StartError

# A pid file has less than so many bytes.
TEXT_MAX = 32


class PidFile:
    """A file with this process's pid, as a context: locked (flock(2)) while it runs, and removed at its end.

    fd: the open file.
    """

    def __init__(self, path: str, fd: int = -1) -> None:
        """fd: the file, if this process has executed the program anew: it is locked already."""
        self._path = path
        self.fd = fd

    def __enter__(self) -> PidFile:
        """Write the file. Raises StartError if it belongs to another process or user, or cannot be written."""
        number = f"{os.getpid()}\n".encode()
        if self.fd >= 0 and self._is_in_place(self.fd):
            return self
        try:
            self.fd = self._open()
            if os.fstat(self.fd).st_uid == os.geteuid():
                os.fchmod(self.fd, 0o644)  # everybody may read the process's number
            os.pwrite(self.fd, number, 0)
            os.ftruncate(self.fd, len(number))
        except OSError as error:
            if self.fd >= 0:
                # Remove a file that had no content before: it may have been made here.
                self._close(remove=not os.fstat(self.fd).st_size)
            reason = "a symbolic link stands there" if error.errno == errno.ELOOP else error.strerror
            raise self._refusal(f"cannot be written: {reason}", error.errno or 0) from None
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it, unless another file stands there by now."""
        self._close(remove=True)

    def _close(self, remove: bool) -> None:
        try:
            if remove and self._is_in_place(self.fd):
                os.unlink(self._path)
        except OSError:
            pass  # rspd may not write in the folder; the next start finds the file stale
        os.close(self.fd)
        self.fd = -1

    def _open(self) -> int:
        """The file, locked and ours to overwrite."""
        while True:
            # If the file is a FIFO, do not wait for a writer.
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
            try:
                self._check(fd)
                if self._is_in_place(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # another process has removed the file meanwhile

    def _check(self, fd: int) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise self._refusal("expected a file, found something else")
        text = os.pread(fd, TEXT_MAX, 0)
        full = len(text) == TEXT_MAX
        text = text.strip()
        if full or (text and not (text.isdigit() and len(text) < 10)):
            raise self._refusal("expected a process's number, found other text; left as it is")
        pid = int(text or b"0")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = f", as process {pid}" if pid else ""
            raise self._refusal(f"rspd runs already{number}") from None
        if pid not in (0, os.getpid()) and _runs(pid):
            named = f"names process {pid}, which runs ({_command(pid)})"
            raise self._refusal(f"{named}; stop that first, or remove the file if it is out of date")

    def _refusal(self, reason: str, code: int = 0) -> StartError:
        return StartError(f"pid file {self._path}: {reason}", os.EX_CANTCREAT, code)

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(fd))
        except FileNotFoundError:
            return False


def process_in(path: str) -> int:
    """The process that a pid file names. Raises StartError."""
    try:
        with open(path, errors="backslashreplace") as file:
            text = file.read(TEXT_MAX).strip()
    except OSError as error:
        code = os.EX_NOPERM if isinstance(error, PermissionError) else os.EX_UNAVAILABLE
        raise StartError(f"pid file {path}: cannot be read: {error.strerror}; is rspd running?", code) from None
    if not (text.isascii() and text.isdigit()) or not int(text):
        raise StartError(f"pid file {path}: expected a process's number, found {text!r}", os.EX_CANTCREAT)
    return int(text)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="backslashreplace") as file:
            return file.read().strip()
    except OSError:
        return "of another user"
