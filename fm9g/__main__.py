"""`python -m fm9g`, the same as the console command `fm9g`."""

import sys

from fm9g.cli import main

sys.exit(main())
