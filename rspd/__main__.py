"""Where a process begins: the command rspd, and python3 -m rspd. To import it stops the garbage collector."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence

# Whatever is imported stays. To look for garbage in it meanwhile takes 5 % of a start.
gc.disable()

# The commands that look at a running rspd.
LOOKS = "status", "connections", "top"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rspd with these arguments, by default the process's, and return its exit code (sysexits(3)).

    If another thread is left, the process ends here with this exit code.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in LOOKS:
        code = _look(words[0], words[1:])
    else:
        from rspd.cli import main as run

        code = run(words)
    threading = sys.modules.get("threading")
    if threading and threading.active_count() > 1:
        # If one wakes while Python takes itself apart, Python may crash (CPython's issue 87135). All output is flushed.
        os._exit(code)
    return code


def _look(name: str, words: Sequence[str]) -> int:
    """Run a command. It needs none of the modules of the daemon: with these, it would take several times as long."""
    from rspd.errors import StartError
    from rspd.log import complain

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    try:
        code = _command(name)(words)
    except StartError as error:
        complain(str(error))
        return error.exit_code
    except Exception:
        import traceback  # for a bug only

        complain(f"unexpected error; please report it\n{traceback.format_exc()}")
        return os.EX_SOFTWARE  # Python's own 1 would mean that a proxy can serve nobody
    return code


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name == "status":
        from rspd.commands.status import main as status

        return status
    if name == "connections":
        from rspd.commands.connections import main as connections

        return connections
    from rspd.commands.top import main as top

    gc.enable()  # it may run for long
    return top


if __name__ == "__main__":
    sys.exit(main())
