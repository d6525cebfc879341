"""Readers of text as people keep it: .txt and .py, markdown, html, web archives, and dumps of a MediaWiki."""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO
from xml.etree.ElementTree import ParseError

import yaml
from datatrove.data import Document

from hfscratch.data import text as rules_of_text
from hfscratch.data.readers import streams
from hfscratch.data.readers.base import FileReader, document_id
from hfscratch.data.sources import bare_extension, printable
from hfscratch.data.text import Undecodable

FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)??(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
"""A block of YAML at the head of a markdown file, as Jekyll, Hugo, Pandoc and the Hub's cards have it."""
PART_BYTES = 2**24
RESET_PAGES = 1000
"""After so many pages, what trafilatura remembers of them is let go."""
HTML_TYPES = ("text/html", "application/xhtml+xml")


class TextReader(FileReader):
    """Reads .txt and .py: every file is one document; of one that is larger than `streams.MAX_RECORD_BYTES`, every
    part of about `PART_BYTES`, cut after a blank line or else after a line."""

    name = "Text"
    format = "text"

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        data = file.read(streams.MAX_RECORD_BYTES + 1)
        if len(data) > streams.MAX_RECORD_BYTES:
            yield from self._parts(path, place, data, file)
            return
        try:
            text, note = rules_of_text.decode_file(data, is_python=bare_extension(path)[0] == ".py")
        except Undecodable as error:
            yield self.fail(path, place, 0, str(error), size_bytes)
        else:
            yield self.make_page(path, place, text, note)

    def _parts(self, path: str, place: int, data: bytes, file: BinaryIO) -> Iterator[Document]:
        number = start = 0
        while data:
            if len(data) - start <= PART_BYTES and (more := file.read(PART_BYTES)):
                data, start = data[start:] + more, 0
            stop = min(start + PART_BYTES, len(data))
            if stop < len(data):
                stop = _cut_before(data, start, stop)
            part, number = data[start:stop], number + 1
            start = stop
            if start == len(data):
                data = b""
            try:
                text, note = rules_of_text.decode_file(part)
            except Undecodable as error:
                yield self.fail(path, place, number, str(error), len(part))
                continue
            document = self.make_page(path, place, text, note)
            document.metadata["number"] = number
            document.id = document_id(self.source.prefix(printable(path)), number, -1)
            yield document

    def make_page(self, path: str, place: int, text: str, note: str | None) -> Document:
        """The document of a file's text."""
        return self.make(path, place, 0, text, note)


def _cut_before(data: bytes, start: int, stop: int) -> int:
    """Where to cut `data` between `start` and `stop`: after the last blank line, else line, else character."""
    for end in (b"\n\n", b"\n"):
        at = data.rfind(end, start, stop)
        if at >= start:
            return at + len(end)
    while stop > start + 1 and data[stop] & 0xC0 == 0x80:  # within a character of UTF-8
        stop -= 1
    return stop


class MarkdownReader(TextReader):
    """Reads .md: every file is one document, and the front matter is no part of its text."""

    name = "Markdown"
    format = "markdown"

    def make_page(self, path: str, place: int, text: str, note: str | None) -> Document:
        body, fields = without_front_matter(text)
        return self.make(path, place, 0, body, note, fields)


def without_front_matter(text: str) -> tuple[str, dict[str, Any]]:
    """A markdown text without the YAML at its head, and what that says; all of it where the head is no YAML."""
    found = FRONT_MATTER.match(text.replace("\r\n", "\n")) if text.startswith("---") else None
    if found is None:
        return text, {}
    try:
        fields = yaml.load(found[1] or "", Loader=yaml.BaseLoader)  # everything as it is written, dates too
    except (yaml.YAMLError, RecursionError):
        return text, {}
    if fields and not isinstance(fields, dict):
        return text, {}
    return text.replace("\r\n", "\n")[found.end() :], {str(key): value for key, value in (fields or {}).items()}


class Extractor:
    """Main text of html pages, without menus, headers, footers and comments.

    Source: Barbaresi 2021, "Trafilatura: A Web Scraping Library" (ACL demonstrations), the extractor of FineWeb.
    """

    def __init__(self) -> None:
        self.num_pages = 0

    def __call__(self, html: bytes) -> tuple[str, dict[str, Any]]:
        """The text, empty if there is none, and what the page says of itself: date, license, author, title …"""
        import trafilatura
        from trafilatura.meta import reset_caches
        from trafilatura.settings import Document

        self.num_pages += 1
        if self.num_pages % RESET_PAGES == 0:
            reset_caches()
        # Of the date only what the page states: a guess from its text would depend on today.
        found = trafilatura.bare_extraction(
            html,
            with_metadata=True,
            include_comments=False,
            date_extraction_params={"extensive_search": False, "original_date": True},
        )
        fields = found.as_dict() if isinstance(found, Document) else {}
        return fields.get("text") or "", {
            name: value for name, value in fields.items() if name != "text" and isinstance(value, (str, list))
        }


class HtmlReader(FileReader):
    """Reads .html: the main text of every file is one document."""

    name = "Html"
    format = "html"
    needs = ("trafilatura",)

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        data = file.read(streams.MAX_RECORD_BYTES + 1)
        if len(data) > streams.MAX_RECORD_BYTES:
            yield self.fail(path, place, 0, streams.too_large(streams.MAX_RECORD_BYTES), size_bytes)
            return
        text, fields = Extractor()(data)
        if text:
            yield self.make(path, place, 0, text, None, fields)
        else:
            yield self.fail(path, place, 0, "no main text", size_bytes)


class _AsItComes:
    """A stream that gives what there is, so that a record before an error is had before the error."""

    def __init__(self, file: BinaryIO) -> None:
        self._read = getattr(file, "read1", file.read)
        self.close = file.close
        self.error: EOFError | None = None

    def read(self, num_bytes: int = -1) -> bytes:
        try:
            return self._read(num_bytes)
        except EOFError as error:  # which warcio takes for the end
            self.error = error
            raise


class WarcReader(FileReader):
    """Reads .warc, and .warc.gz as Common Crawl has it: every page that a server gave is one document, html pages by
    their main text. Of WET files, every conversion is. Requests, metadata, pictures and so on are no documents."""

    name = "Warc"
    format = "warc"
    broken = "warc"
    needs = ("warcio", "trafilatura")

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

        extract = Extractor()
        stream = _AsItComes(file)
        number = 0
        try:
            for record in ArchiveIterator(stream):
                kind = record.rec_headers.get_header("WARC-Type") or record.rec_type
                if kind not in ("response", "conversion", "resource"):
                    continue
                headers = record.http_headers if kind == "response" and record.http_headers else record.rec_headers
                content_type = (headers.get_header("Content-Type") or "").split(";")[0].strip().lower()
                if content_type not in (*HTML_TYPES, "text/plain"):
                    continue
                number += 1
                stated = record.rec_headers.get_header("Content-Length") or ""
                address = record.rec_headers.get_header("WARC-Target-URI") or ""
                fields = {"date": record.rec_headers.get_header("WARC-Date"), "url": address}
                status = record.http_headers.get_statuscode() if kind == "response" and record.http_headers else "200"
                if not status.startswith("2"):
                    yield self.fail(path, place, number, "no page", 0, f"status {status}, {address}")
                    continue
                content = record.content_stream()
                data = content.read(streams.MAX_RECORD_BYTES + 1)
                if len(data) > streams.MAX_RECORD_BYTES:
                    size = int(stated) if stated.isdigit() else len(data)
                    yield self.fail(path, place, number, streams.too_large(streams.MAX_RECORD_BYTES), size, address)
                elif getattr(record.raw_stream, "limit", 0) > 0:
                    yield self.fail(path, place, number, "broken warc", size_bytes, "it ends within a record")
                    return
                elif not getattr(getattr(content, "decompressor", None), "eof", True):  # of which warcio says nothing
                    reason = f"what the server sent compressed is cut, {address}"
                    yield self.fail(path, place, number, "broken warc", len(data), reason)
                else:
                    yield self._page(path, place, number, data, content_type in HTML_TYPES, fields, extract)
        except ArchiveLoadFailed as error:
            yield self.fail(path, place, number + 1, "broken warc", size_bytes, error)
        if stream.error is not None:
            raise stream.error

    def _page(
        self,
        path: str,
        place: int,
        number: int,
        data: bytes,
        is_html: bool,
        fields: dict[str, Any],
        extract: Extractor,
    ) -> Document:
        note = None
        if is_html:
            text, stated = extract(data)
            fields = stated | {name: value for name, value in fields.items() if value}
            if not text:
                return self.fail(path, place, number, "no main text", len(data), fields["url"])
        else:
            try:
                text, note = rules_of_text.decode_file(data)
            except Undecodable as error:
                return self.fail(path, place, number, str(error), len(data), fields["url"])
        return self.make(path, place, number, text, note, fields)


class MediaWikiReader(FileReader):
    """Reads .xml dumps of a MediaWiki, such as Wikipedia's `…-pages-articles.xml.bz2`: every article is one document,
    of which the last revision counts. Redirects and pages of other namespaces (talk, users, files) are none."""

    name = "MediaWiki"
    format = "mediawiki"
    broken = "XML"
    needs = ("mwxml", "mwparserfromhell")

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        import mwxml
        from mwxml.element_iterator import ElementIterator
        from mwxml.errors import MalformedXML

        number = 0
        try:
            root = ElementIterator.from_file(file)
            if root.tag != "mediawiki":
                yield self.fail(path, place, 0, "not a MediaWiki dump", size_bytes, f"it begins with <{root.tag}>")
                return
            dump = mwxml.Dump.from_element(root)
            plain = PlainWiki(dump.site_info.namespaces or ())
            for page in dump:
                root.element.clear()  # else every page would leave an empty element behind
                if not isinstance(page, mwxml.Page) or page.namespace != 0 or page.redirect:
                    continue
                number += 1
                try:
                    last = collections.deque(page, maxlen=1)
                except (ValueError, TypeError) as error:  # a revision's number or date is none
                    yield self.fail(path, place, number, "broken XML", 0, f"{page.title}: {error}")
                    continue
                text = last[0].text if last else None
                if text is None:
                    yield self.fail(path, place, number, "null text", 0, page.title)
                    continue
                fields = {"title": page.title, "date": str(last[0].timestamp) if last[0].timestamp else None}
                yield self.make(path, place, number, plain(text), None, fields)
        except (ParseError, MalformedXML, ValueError, TypeError) as error:  # the last two of a page's own number
            yield self.fail(path, place, number + 1, "broken XML", size_bytes, error)


class PlainWiki:
    """Wikitext as plain text: without templates, tables, references, files and categories; links by their words.

    After the script of `wikimedia/wikipedia` on the Hub.
    """

    ENGLISH = ("File", "Image", "Media", "Category")
    UNREAD_TAGS = frozenset({"ref", "table", "gallery", "math", "timeline", "imagemap", "score", "syntaxhighlight"})

    def __init__(self, namespaces: Any) -> None:
        names = {each.name for each in namespaces if each.id in (-2, 6, 14) and each.name}
        alternatives = "|".join(re.escape(name) for name in sorted({*self.ENGLISH, *names}))
        self.is_unread = re.compile(rf"\s*(?:{alternatives})\s*:", re.IGNORECASE)
        self.magic = re.compile(r"__[A-Z]+__")

    def __call__(self, wikitext: str) -> str:
        import mwparserfromhell

        code = mwparserfromhell.parse(wikitext, skip_style_tags=False)
        for link in code.filter_wikilinks(recursive=True):
            if self.is_unread.match(str(link.title)):
                self._remove(code, link)
        for tag in code.filter_tags(recursive=True):
            if str(tag.tag).lower() in self.UNREAD_TAGS:
                self._remove(code, tag)
        lines = self.magic.sub("", code.strip_code(normalize=True, collapse=True)).split("\n")
        text = "\n".join(line.rstrip() for line in lines)
        return re.sub("\n{3,}", "\n\n", text).strip()

    @staticmethod
    def _remove(code: Any, node: Any) -> None:
        with contextlib.suppress(ValueError):  # it went with what it stood in
            code.remove(node)


PAGES = (TextReader, MarkdownReader, HtmlReader, WarcReader, MediaWikiReader)
