"""datatrove readers that lose nothing: what cannot be read becomes a document without text that says why.

datatrove's own readers log a bad record and go on, so that nobody can count it; these hand it down the pipeline, where
`rules.Readable` drops it with its reason. A document's `metadata` holds where it came from:

    source      label of the source
    path        file below the source's root (in an archive, the file in it), or split of a Hub dataset
    file        place of the file among all files of all sources, which orders documents
    number      line, row or page in the file, or document in the archive, from 1; 0 where the file is the document
    piece       which piece of a document that was cut; -1 where it was not
    is_code     whether nothing may be changed that could carry meaning to a parser
    group       value of the source's `group_by` column, where there is one: what has the same stays on one side
    license     the licence that the document, or else its source, states
    date        the date that the document states
    note        what else is worth knowing, for the ledger
    failure     why there is no text
    size_bytes  size of what could not be read
"""

import importlib.util
from collections.abc import Mapping

from hfscratch.data.readers.archives import ARCHIVES, IGNORED
from hfscratch.data.readers.base import CountingReader, FileReader, document_id
from hfscratch.data.readers.hub import HubReader, HubStreamReader
from hfscratch.data.readers.pages import PAGES
from hfscratch.data.readers.records import RECORDS
from hfscratch.data.sources import FoundSource
from hfscratch.errors import missing_extra

READERS: tuple[type[FileReader], ...] = (*PAGES, *RECORDS, *ARCHIVES)
"""One for every format of `sources.FORMATS`."""


def make_readers(source: FoundSource, places: Mapping[str, int]) -> dict[str, FileReader]:
    """By format, the readers of a source's files.

    Raises: MachineError if a package is missing that a format needs; an archive may hold any.
    """
    readers = {kind.format: kind(source, places) for kind in READERS}
    readers = {name: reader for name, reader in readers.items() if reader.files}
    needed = {module for reader in readers.values() for module in reader.needs}
    if any(kind.format in readers for kind in ARCHIVES):
        needed |= {module for kind in READERS for module in kind.needs}
    for module in sorted(needed):
        if importlib.util.find_spec(module) is None:
            raise missing_extra(module, "web")
    return readers


__all__ = [
    "IGNORED",
    "READERS",
    "CountingReader",
    "FileReader",
    "HubReader",
    "HubStreamReader",
    "document_id",
    "make_readers",
]
