"""`python -m mgvq_serve`, the same as `mgvq-serve` (calls `mgvq_serve.cli.main`)."""

import sys

from mgvq_serve.cli import main

sys.exit(main())
