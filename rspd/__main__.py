"""Where a process begins: the command rspd, and python3 -m rspd. To import it stops the garbage collector."""

import gc
import sys

# Whatever is imported stays. To look for garbage in it meanwhile takes 5 % of a start.
gc.disable()

from rspd.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
