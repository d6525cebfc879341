"""`python -m hfscratch`, which is also what `accelerate launch -m hfscratch` starts."""

import sys

from hfscratch.cli import main

sys.exit(main())
