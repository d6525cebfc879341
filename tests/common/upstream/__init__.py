"""transformers' own common tests as a package: the files of its source archive, beside stand-ins for those it lacks.

HFSCRATCH_TRANSFORMERS_TESTS names the folder that `fetch.py` made. A file of the archive is preferred to a stand-in of
the same name, so that these disappear by themselves should a later archive be complete.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(os.environ["HFSCRATCH_TRANSFORMERS_TESTS"])
if not (FOLDER / "test_modeling_common.py").is_file():
    raise FileNotFoundError(f"HFSCRATCH_TRANSFORMERS_TESTS is {FOLDER}, and no test_modeling_common.py is there")
__path__.insert(0, str(FOLDER))
