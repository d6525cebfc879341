"""`python -m hfscratch`, which is also what `accelerate launch -m hfscratch` starts."""

import os
import sys

from hfscratch.cli import main

if "RANK" not in os.environ:
    sys.exit(main())

from hfscratch.training import processes

processes.die_with_parent()
processes.release_builds()
processes.end(main())
