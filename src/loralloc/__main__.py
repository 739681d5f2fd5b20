"""`python -m loralloc` is the command `loralloc`."""

import sys

from loralloc.cli import main

sys.exit(main())
