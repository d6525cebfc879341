"""Raw text to clean documents, splits, and a ledger of what was dropped and why.

`inspect` and what lists files are light and stand here. What reads imports datatrove and pyarrow and is taken from its
module: `corpus` (the two passes), `readers`, `rules`, `executor`, `card`.
"""

from hfscratch.data.inspection import Inspection, inspect
from hfscratch.data.sources import (
    FORMATS,
    STDLIB,
    FoundSource,
    SourceFile,
    digests,
    distinct_labels,
    expand,
    find_source,
    printable,
)

__all__ = [
    "FORMATS",
    "STDLIB",
    "FoundSource",
    "Inspection",
    "SourceFile",
    "digests",
    "distinct_labels",
    "expand",
    "find_source",
    "inspect",
    "printable",
]
