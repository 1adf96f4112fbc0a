"""`python -m diagnostics`: the command without its console script."""

import sys

from diagnostics.cli.main import main

sys.exit(main())
