"""`python -m tkpo` is `tkpo`."""

import sys

from tkpo.cli import main

sys.exit(main())
