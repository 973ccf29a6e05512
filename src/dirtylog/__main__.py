"""``python -m dirtylog``."""

import sys

from dirtylog.cli import main

sys.exit(main())
