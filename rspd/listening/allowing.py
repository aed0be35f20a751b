"""Who may connect to a unix socket with a path: the mode and the group of its file."""

import errno
import os
import stat

from rspd.net.listener import NO_FILE, PRIVATE, Listener, socket_file

# The mode of a new socket; its file has that, less the umask.
USUAL = 0o777

# Who may write in a folder besides its owner.
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def allow(listener: Listener, mode: int, group: str) -> None:
    """Let a mode and a group decide who may connect, until `allow_as_usual`. Raises OSError with the reason.

    If another file stands at the path by now, that file stays as it is.
    group: its name; empty for that of a new file.
    """
    os.fchmod(listener.fd, PRIVATE)  # no more than a note, which the next process finds too
    place, name = os.path.split(listener.address.path)
    folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Who owns the folder may put a link there at any time. So the file is opened first, and changed by that.
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            status = os.fstat(fd)
            if listener.file == NO_FILE or socket_file(status) != listener.file:
                return
            file = _way_to(fd, name, folder)
            try:
                gid = _gid(group, folder)
                # The hardened unit refuses chown(2), also if nothing would change.
                if status.st_gid != gid:
                    _give(file, folder, gid, group)
            finally:
                os.chmod(file, mode, dir_fd=folder)
        finally:
            os.close(fd)
    finally:
        os.close(folder)


def allow_as_usual(listener: Listener) -> None:
    """Let those connect who may connect to a new socket, if another mode or group decides so far. As for `allow`."""
    if stat.S_IMODE(os.fstat(listener.fd).st_mode) == PRIVATE:
        umask = os.umask(0o777)
        os.umask(umask)
        allow(listener, USUAL & ~umask, "")
        os.fchmod(listener.fd, USUAL)


def _way_to(fd: int, name: str, folder: int) -> str:
    """What leads from a folder to an open file there, and to no other one. Raises OSError with the reason."""
    file = f"/proc/self/fd/{fd}"
    if os.path.exists(file):
        return file
    status = os.fstat(folder)
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & OTHERS_WRITE:
        expected = "expected /proc, or a folder in which nobody else may write, found neither"
        raise OSError(errno.ENOENT, f"{expected}; mount /proc, or take the socket to such a folder")
    return name


def _gid(group: str, folder: int) -> int:
    """The number of a group; if its name is empty, of that which a new file in this folder has (inode(7))."""
    if not group:
        status = os.fstat(folder)
        return status.st_gid if status.st_mode & stat.S_ISGID else os.getegid()
    import grp  # hardly anybody needs another group

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(errno.EINVAL, f"expected a group of this host, found {group!r}") from None


def _give(file: str, folder: int, gid: int, group: str) -> None:
    """Give a file of ours in a folder to a group; `group` is empty if that is the usual one. Raises as `allow` does."""
    try:
        os.chown(file, -1, gid, dir_fd=folder)
    except PermissionError:
        needed = f"SupplementaryGroups={group} and SystemCallFilter=@chown"
        what = f"rspd may not give the socket to the group {group}; its unit needs {needed}"
        if not group:
            what = "the socket keeps the group that it had; it gets its own at a stop and a start of rspd"
        raise OSError(errno.EPERM, what) from None
