"""python -m rspd"""

import sys

from rspd.cli import main

sys.exit(main())
