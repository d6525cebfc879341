"""What is read of every format, and what becomes of files that are cut, lie, loop, climb out or expand without end."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import http.server
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from hfscratch.data import corpus, find_source
from hfscratch.data.readers import READERS, streams
from hfscratch.data.readers.pages import PlainWiki, without_front_matter
from hfscratch.data.sources import FORMATS, digests, format_of
from hfscratch.errors import DataError, MachineError, UsageError

TEXTS = [f"Text {number}, in which “quotes”, commas and\nline ends stand." for number in range(20)]
ARTICLE = (
    "The lighthouse at the end of the peninsula was built by hand over eleven years, and its keeper wrote a diary of "
    "every storm, every ship and every visitor that came along the narrow road between the dunes and the sea. "
)
PAGE = f"""<!DOCTYPE html><html lang="en"><head><title>The lighthouse</title>
<meta name="author" content="Ada Keeper"><meta property="article:published_time" content="2021-03-04T10:00:00Z">
</head><body><nav><ul><li><a href="/">Home</a></li><li><a href="/shop">Our shop</a></li></ul></nav>
<article><h1>The lighthouse</h1><p>{ARTICLE * 2}</p><p>{ARTICLE.replace("lighthouse", "windmill") * 2}</p></article>
<footer><p>Cookie settings and newsletter</p></footer></body></html>"""
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd.compress}


def read(path, folder, *, strict=False, workers=1, **details):
    """The documents kept and dropped by the first pass, by id."""
    source = find_source(str(path), **details)
    plan = corpus.plan_reading([source])
    advanced = []
    num_read = corpus.read(
        plan,
        folder / "pass",
        strict=strict,
        chunk_chars=None,
        min_chars=1,
        max_chars=None,
        workers=workers,
        advance=advanced.append,
    )
    kept = [row for shard in corpus.kept_shards(folder / "pass") for row in pq.read_table(shard).to_pylist()]
    dropped = [row for shard in corpus.shards(folder / "pass" / "dropped") for row in pq.read_table(shard).to_pylist()]
    assert num_read == len(kept) + len(dropped) == len({row["id"] for row in kept + dropped})
    if source.hub_id is None:
        assert sum(advanced) == plan.size_bytes
    order = sorted(kept, key=lambda row: (row["file"], row["number"]))
    return {row["id"]: row for row in order}, {row["id"]: row for row in dropped}


def texts(kept):
    return [row["text"] for row in kept.values()]


def reasons(dropped):
    return {key: row["reason"] for key, row in dropped.items()}


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(records, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode()


# ---------------------------------------------------------------------------------------------------------------------
# Records


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_records_arrive_from_every_format_and_compression_with_what_they_state(tmp_path, kind, compression):
    records = [
        {"by": f"author {number % 3}", "text": text, "license": "CC0-1.0" if number else "", "date": "2020-01-02"}
        for number, text in enumerate(TEXTS)
    ]
    made = jsonl(records) if kind == "jsonl" else table(records, "\t" if kind == "tsv" else ",")
    name = f"books.{kind}{compression}"
    (tmp_path / name).write_bytes(COMPRESS[compression](made))
    kept, dropped = read(tmp_path / name, tmp_path, group_by="by", license="MIT")
    assert texts(kept) == TEXTS and not dropped
    assert [row["group"] for row in kept.values()] == [record["by"] for record in records]
    assert [row["license"] for row in kept.values()] == ["MIT"] + ["CC0-1.0"] * 19
    assert {row["date"] for row in kept.values()} == {"2020-01-02"}
    assert next(iter(kept)) == f"{name}:1"


@pytest.mark.parametrize("form", ["stream", "file", "datasets", "parquet"])
def test_arrow_and_parquet_tables_arrive_with_what_they_state(tmp_path, form):
    columns = {
        "body": TEXTS * 40,
        "licence": ["MIT", None] * 400,
        "published": pa.array([18262] * 800, pa.date32()),
        "other": range(800),
    }
    made = pa.table(columns)
    path = tmp_path / ("rows.parquet" if form == "parquet" else "rows.arrow")
    if form == "datasets":
        datasets.Dataset.from_dict({"body": TEXTS * 40, "licence": columns["licence"]}).save_to_disk(tmp_path / "set")
        path = next((tmp_path / "set").glob("*.arrow"))
    elif form == "parquet":
        pq.write_table(made, path)
    else:
        opener = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with opener(path, made.schema) as writer:
            writer.write_table(made, max_chunksize=300)
    details = {"text_column": "body", "license_column": "licence", "date_column": "published"}
    kept, dropped = read(path, tmp_path, **details)
    assert texts(kept) == TEXTS * 40 and not dropped
    assert [row["license"] for row in kept.values()] == columns["licence"]
    assert {row["date"] for row in kept.values()} == ({None} if form == "datasets" else {"2020-01-01"})


def test_records_with_the_same_id_of_their_own_are_different_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"id": 7, "text": "one"}, {"id": 7, "text": "two"}]))
    kept, _ = read(tmp_path / "a.jsonl", tmp_path)
    assert {key: row["text"] for key, row in kept.items()} == {"a.jsonl:1": "one", "a.jsonl:2": "two"}


def test_csv_rows_that_are_broken_are_named_and_the_rest_is_kept(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'n,text\r\n1,"two\r\nlines"\r\n2,"ill "quoted" text"\r\n3\r\n\r\n'
        b'4,four,five\r\n5,fine\r\n6,"never ends\r\n7,seven\r\n'
    )
    kept, dropped = read(tmp_path / "a.csv", tmp_path)
    assert texts(kept) == ["two\nlines", "fine", "seven"]
    assert reasons(dropped) == {
        "a.csv:2": "broken row",
        "a.csv:3": "mixed columns",
        "a.csv:4": "mixed columns",
        "a.csv:6": "broken row",
    }
    assert dropped["a.csv:4"]["note"] == "3 fields, where the first line names 2"


def test_csv_without_the_column_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("n,body\n1,x\n")
    (tmp_path / "b.tsv").write_text("text\ttext\n1\tx\n")
    (tmp_path / "c.csv").write_text("text\nfine\n")
    kept, dropped = read(tmp_path, tmp_path)
    assert texts(kept) == ["fine"]
    assert sorted(reasons(dropped).values()) == ["no text column", "several text columns"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_of_any_length_is_passed_over_without_being_held(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 3 * 2**20)
    path = tmp_path / f"a.{kind}"
    before, after = (
        ('{"text": "before"}\n', '{"text": "after"}\n') if kind == "jsonl" else ("text\nbefore\n", "after\n")
    )
    with path.open("w") as file:
        file.write(before)
        for _ in range(40):
            file.write("x" * 2**20)
        file.write("\n" + after)
    kept, dropped = read(path, tmp_path)
    assert texts(kept) == ["before", "after"]
    assert reasons(dropped) == {f"a.{kind}:2": "larger than 3 MiB"}
    assert next(iter(dropped.values()))["size_bytes"] == 40 * 2**20 + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_line_of_two_gigabytes_takes_no_gigabyte_of_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('{"text": "before"}\n{"text": "')
        for _ in range(2048):
            file.write("x" * 2**20)
        file.write('"}\n{"text": "after"}\n')
    code = (
        "from pathlib import Path\nfrom tests.data.test_readers import read, texts, reasons\n"
        f"kept, dropped = read({str(path)!r}, Path({str(tmp_path)!r}))\n"
        "assert texts(kept) == ['before', 'after'] and list(reasons(dropped).values()) == ['larger than 64 MiB']\n"
        # not ru_maxrss, which a process begins with as its parent had it
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) < 1_000_000  # KiB


# ---------------------------------------------------------------------------------------------------------------------
# Cut, damaged, lying


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".zst"])
def test_a_compressed_file_that_is_cut_gives_what_it_has_and_is_named(tmp_path, compression):
    import random

    rng = random.Random(0)
    many = [{"text": " ".join(rng.choice("abcdefgh") * rng.randrange(1, 9) for _ in range(200))} for _ in range(3000)]
    whole = COMPRESS[compression](jsonl(many))
    (tmp_path / f"a.jsonl{compression}").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "b.txt").write_text("whole")
    kept, dropped = read(tmp_path, tmp_path)
    name = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}[compression]
    assert texts(kept)[:-1] == [record["text"] for record in many[: len(kept) - 1]] and len(kept) > 100
    assert texts(kept)[-1] == "whole"
    assert f"broken {name}" in reasons(dropped).values()
    with pytest.raises(DataError, match=r"data\.strict is true"):
        read(tmp_path, tmp_path / "strict", strict=True)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.csv.bz2", "a.txt.zst", "a.arrow", "a.parquet", "a.zip", "a.tar", "a.tgz"]
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing, by no means" * 100)
    (tmp_path / "b.txt").write_text("whole")
    kept, dropped = read(tmp_path, tmp_path)
    assert texts(kept) == ["whole"]
    (reason,) = reasons(dropped).values()
    assert reason.startswith("broken ")


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "xml", "tar"])
def test_what_expands_without_end_is_given_up_before_it_fills_the_memory(tmp_path, kind, compression, monkeypatch):
    monkeypatch.setattr(streams, "FREE_EXPANSION_BYTES", 2**20)
    monkeypatch.setattr(streams, "MAX_EXPANSION", 50)
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 2**26)
    content = b"a" * 30_000_000
    if kind == "tar":
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo("inner.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        content = file.getvalue()
    elif kind == "xml":
        content = b"<mediawiki><siteinfo></siteinfo><page>" + content
    elif kind == "csv":
        content = b"text\n" + content
    (tmp_path / f"bomb.{kind}{compression}").write_bytes(COMPRESS[compression](content))
    kept, dropped = read(tmp_path / f"bomb.{kind}{compression}", tmp_path)
    assert not kept
    assert "expands without end" in reasons(dropped).values()


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def archive(path, members):
    """An archive of `(name, bytes)`, of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members:
                file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    path.write_bytes(COMPRESS[{".tgz": ".gz", ".tar": ""}.get(path.suffix, path.suffix)](made.getvalue()))


def parquet(texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


ARCHIVES = ["a.zip", "a.tar", "a.tgz", "a.tar.zst"]


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_files_in_an_archive_are_read_as_they_would_be_beside_it(tmp_path, name):
    members = [
        ("one.txt", b"one"),
        ("docs/two.md", b"---\nlicense: MIT\n---\ntwo"),
        ("docs/code.py", b"three = 3\n"),
        ("records.jsonl.gz", gzip.compress(jsonl([{"text": "four"}, {"text": None}, {"text": "five"}]), mtime=0)),
        ("rows.parquet", parquet(["six", "seven"])),
        ("one.txt", b"another one"),
        ("picture.png", b"\x89PNG"),
        ("__MACOSX/._one.txt", b"junk"),
        (".hidden.txt", b"junk"),
        ("inner.zip", b"PK"),
    ]
    archive(tmp_path / name, members)
    kept, dropped = read(tmp_path / name, tmp_path)
    assert texts(kept) == ["one", "two", "three = 3\n", "four", "five", "six", "seven", "another one"]
    assert list(kept) == [f"{name}:{number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert kept[f"{name}:2"]["path"] == f"{name}/docs/two.md" and kept[f"{name}:2"]["license"] == "MIT"
    assert [row["is_code"] for row in kept.values()].index(True) == 2
    assert reasons(dropped) == {f"{name}:5": "null text"}


@pytest.mark.parametrize("name", ARCHIVES)
def test_paths_that_climb_out_of_an_archive_are_named_and_nothing_is_written_outside(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    evil = ["../evil.txt", "/evil.txt", "docs/../../evil.txt", "C:/evil.txt", "..\\evil.txt"]
    archive(inside / name, [("good.txt", b"good"), *((each, b"evil") for each in evil), ("last.txt", b"last")])
    before = set(tmp_path.rglob("*"))
    kept, dropped = read(inside / name, tmp_path / "out")
    assert texts(kept) == ["good", "last"]
    assert list(reasons(dropped).values()) == ["leads out of the archive"] * 5
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    assert outside == before and not Path("/evil.txt").exists()


def test_links_in_an_archive_lead_nowhere(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, kind in (("link.txt", tarfile.SYMTYPE), ("hard.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "secret.txt"
            file.addfile(info)
        info = tarfile.TarInfo("real.txt")
        info.size = 4
        file.addfile(info, io.BytesIO(b"real"))
    kept, dropped = read(tmp_path / "a.tar", tmp_path)
    assert texts(kept) == ["real"] and not dropped


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_many_members_that_expand_without_end_together_are_given_up(tmp_path, name, monkeypatch):
    monkeypatch.setattr(streams, "FREE_EXPANSION_BYTES", 2**20)
    monkeypatch.setattr(streams, "MAX_EXPANSION", 50)
    archive(tmp_path / name, [("first.txt", b"first"), *((f"{number}.txt", b"0" * 900_000) for number in range(40))])
    kept, dropped = read(tmp_path / name, tmp_path)
    assert texts(kept)[0] == "first" and 1 < len(kept) < 40
    assert "expands without end" in reasons(dropped).values()


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_cut_gives_what_it_has_or_is_named(tmp_path, name):
    import random

    rng = random.Random(1)
    archive(tmp_path / name, [(f"{number}.txt", rng.randbytes(9000).hex().encode()) for number in range(40)])
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_text("whole")
    kept, dropped = read(tmp_path, tmp_path)
    assert texts(kept)[-1] == "whole" and (name == "a.zip" or len(kept) > 5)  # a zip's directory is at its end
    assert any(reason.startswith("broken ") for reason in reasons(dropped).values())


def test_a_damaged_or_encrypted_member_of_a_zip_is_named_and_the_rest_is_kept(tmp_path):
    archive(tmp_path / "a.zip", [("one.txt", b"one" * 50), ("two.txt", b"two" * 50), ("three.txt", b"three" * 50)])
    content = bytearray((tmp_path / "a.zip").read_bytes())
    at = content.index(b"two.txt") + len(b"two.txt") + 3
    content[at] ^= 0xFF
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"three.txt"))
    content[entry + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    kept, dropped = read(tmp_path / "a.zip", tmp_path)
    assert texts(kept) == ["one" * 50]
    assert sorted(reasons(dropped).values()) == ["broken zip", "encrypted"]


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_front_matter_is_taken_off_a_markdown_file_and_its_statements_kept(tmp_path):
    (tmp_path / "a.md").write_text(
        "---\ntitle: A\nauthor: Ada\nlicense: [MIT, CC0-1.0]\ndate: 2020-02-03\n---\n# A\n\nText.\n"
    )
    (tmp_path / "b.md").write_text("---\n\nA rule above, and no front matter.\n\n---\n\nMore.\n")
    (tmp_path / "c.md").write_text("No head.\n---\na: 1\n---\n")
    kept, _ = read(tmp_path, tmp_path, group_by="author")
    rows = {key.split("/")[-1]: row for key, row in kept.items()}
    assert rows["a.md"]["text"] == "# A\n\nText.\n"
    assert [rows["a.md"][name] for name in ("license", "date", "group")] == ["MIT, CC0-1.0", "2020-02-03", "Ada"]
    assert rows["b.md"]["text"].startswith("---\n\nA rule above")
    assert rows["c.md"]["text"] == "No head.\n---\na: 1\n---\n"


@pytest.mark.parametrize(
    ("text", "body", "fields"),
    [
        ("---\n---\nx", "x", {}),
        ("---\r\na: 1\r\n---\r\nx\r\n", "x\n", {"a": "1"}),
        ("---\na: [1\n---\nx", "---\na: [1\n---\nx", {}),
        ("---\n- list\n---\nx", "---\n- list\n---\nx", {}),
        ("---\ndate: 2020-99-99\n---\nx", "x", {"date": "2020-99-99"}),
        ("---\na: 1\n", "---\na: 1\n", {}),
        ("--- a: 1 ---\nx", "--- a: 1 ---\nx", {}),
    ],
)
def test_only_a_yaml_mapping_at_the_head_is_front_matter(text, body, fields):
    assert without_front_matter(text) == (body, fields)


def test_a_statement_without_end_states_nothing(tmp_path):
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20))
    (tmp_path / "laughs.md").write_text(f"---\n{laughs}license: *a19\ndate: 2020-01-02\n---\nText.\n")
    (tmp_path / "deep.jsonl").write_text('{"text": "Text.", "license": ' + "[" * 1000 + "]" * 1000 + "}\n")
    kept, dropped = read(tmp_path, tmp_path / "out")
    assert [row["text"].strip() for row in kept.values()] == ["Text."] * 2 and not dropped
    assert [row["license"] for row in kept.values()] == [None] * 2
    assert {row["date"] for row in kept.values()} == {"2020-01-02", None}


def test_html_gives_its_main_text_and_what_it_states(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "empty.htm").write_text("<html><head><title>Home</title></head><body></body></html>")
    (tmp_path / "latin.html").write_bytes(PAGE.replace("windmill", "café").encode("latin-1"))
    kept, dropped = read(tmp_path, tmp_path, group_by="author")
    page = next(row for key, row in kept.items() if key.endswith("/a.html"))
    assert ARTICLE.strip() in page["text"] and "windmill" in page["text"]
    assert "Cookie" not in page["text"] and "Our shop" not in page["text"]
    assert page["date"] == "2021-03-04" and page["group"] == "Ada Keeper"
    assert "café" in next(row for key, row in kept.items() if key.endswith("/latin.html"))["text"]
    assert list(reasons(dropped).values()) == ["no main text"]


def warc(records, compress=True):
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    file = io.BytesIO()
    writer = WARCWriter(file, gzip=compress)
    writer.write_record(writer.create_warcinfo_record("a.warc", {"software": "test"}))
    for number, (kind, content_type, status, content) in enumerate(records):
        address = f"http://example.org/{number}"
        if kind == "response":
            headers = StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.1")
            record = writer.create_warc_record(address, kind, payload=io.BytesIO(content), http_headers=headers)
        else:
            headers = {"Content-Type": content_type}
            record = writer.create_warc_record(
                address, kind, payload=io.BytesIO(content), warc_content_type=content_type
            )
        record.rec_headers.replace_header("WARC-Date", "2022-05-06T07:08:09Z")
        writer.write_record(record)
    return file.getvalue()


CRAWL = [
    ("response", "text/html; charset=utf-8", "200 OK", PAGE.encode()),
    ("request", "application/http", "", b"GET / HTTP/1.1\r\n\r\n"),
    ("response", "image/png", "200 OK", b"\x89PNG"),
    ("response", "text/html", "404 Not Found", b"<html><body>gone</body></html>"),
    ("response", "text/plain", "200 OK", b"Plain text, na\xc3\xafve."),
    ("conversion", "text/plain", "", b"Converted text."),
]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_web_archive_gives_its_pages(tmp_path, name):
    (tmp_path / name).write_bytes(warc(CRAWL, compress=name.endswith(".gz")))
    kept, dropped = read(tmp_path / name, tmp_path)
    first, *others = texts(kept)
    assert ARTICLE.strip() in first and others == ["Plain text, naïve.", "Converted text."]
    assert list(kept) == [f"{name}:{number}" for number in (1, 3, 4)]
    assert {row["date"] for row in kept.values()} == {"2022-05-06T07:08:09Z"}
    assert reasons(dropped) == {f"{name}:2": "no page"} and "404" in dropped[f"{name}:2"]["note"]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_web_archive_that_is_cut_gives_what_it_has_and_is_named(tmp_path, name):
    many = [("response", "text/html", "200 OK", PAGE.replace("storm", f"storm {n}").encode()) for n in range(6)]
    whole = warc(many, compress=name.endswith(".gz"))
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    kept, dropped = read(tmp_path / name, tmp_path)
    assert 3 <= len(kept) <= 4
    assert len(dropped) == 1 and next(iter(reasons(dropped).values())).startswith("broken ")


def test_a_page_that_the_server_sent_compressed_is_read_and_one_that_is_cut_is_named(tmp_path):
    whole = gzip.compress(PAGE.encode())
    pages = [("response", "text/html", "200 OK\r\nContent-Encoding: gzip", each) for each in (whole[:-30], whole)]
    (tmp_path / "a.warc").write_bytes(warc(pages, compress=False))
    kept, dropped = read(tmp_path / "a.warc", tmp_path)
    assert list(kept) == ["a.warc:2"] and ARTICLE.strip() in texts(kept)[0]
    assert reasons(dropped) == {"a.warc:1": "broken warc"} and "compressed is cut" in dropped["a.warc:1"]["note"]


def wiki(pages, end="</mediawiki>"):
    head = (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de"><siteinfo>'
        "<sitename>Wikipedia</sitename><dbname>dewiki</dbname><base>https://de.wikipedia.org/wiki/</base>"
        '<generator>MediaWiki</generator><case>first-letter</case><namespaces><namespace key="0" case="first-letter" />'
        '<namespace key="1" case="first-letter">Diskussion</namespace>'
        '<namespace key="6" case="first-letter">Datei</namespace></namespaces></siteinfo>'
    )
    body = ""
    for number, (title, namespace, redirect, text) in enumerate(pages, start=1):
        body += (
            f"<page><title>{title}</title><ns>{namespace}</ns><id>{number}</id>"
            + (f'<redirect title="{redirect}" />' if redirect else "")
            + f"<revision><id>{number}</id><timestamp>2023-01-0{number}T00:00:00Z</timestamp><contributor>"
            "<username>U</username><id>1</id></contributor><origin>1</origin><model>wikitext</model>"
            f'<format>text/x-wiki</format><text bytes="1" sha1="x" xml:space="preserve">{text}</text>'
            "<sha1>x</sha1></revision></page>"
        )
    return (head + body + end).encode()


WIKITEXT = (
    "{{Infobox|name=Berg}}'''Ein Berg''' ist eine [[Landform|Erhebung]] der [[Erde]].&lt;ref&gt;Quelle&lt;/ref&gt;\n"
    "[[Datei:Berg.jpg|mini|Ein [[Berg]] im Winter]]\n== Höhe ==\n{| class=wikitable\n| 1 || 2\n|}\nEr ist ''hoch''.\n"
    "[[Kategorie:Berge]] [[Category:Mountains]]"
)


@pytest.mark.parametrize("compression", ["", ".bz2"])
def test_a_wikipedia_dump_gives_its_articles_as_plain_text(tmp_path, compression):
    pages = [("Berg", 0, None, WIKITEXT), ("Hügel", 0, "Berg", "#REDIRECT"), ("Diskussion:Berg", 1, None, "x")]
    name = f"dewiki-pages-articles.xml{compression}"
    (tmp_path / name).write_bytes(COMPRESS[compression](wiki([*pages, ("Tal", 0, None, "Ein Tal.")])))
    kept, dropped = read(tmp_path / name, tmp_path, license="CC-BY-SA-4.0")
    first, second = kept.values()
    assert first["text"].startswith("Ein Berg ist eine Erhebung der Erde.\n")
    assert "Er ist hoch." in first["text"]
    assert not any(word in first["text"] for word in ("Infobox", "Quelle", "Winter", "wikitable", "Category", "[", "{"))
    assert second["text"] == "Ein Tal." and second["date"] == "2023-01-04T00:00:00Z"
    assert first["license"] == "CC-BY-SA-4.0" and not dropped


@pytest.mark.parametrize("compression", ["", ".bz2", ".gz"])
def test_a_wikipedia_dump_that_is_cut_gives_what_it_has_and_is_named(tmp_path, compression):
    whole = wiki([(f"Berg {n}", 0, None, f"Berg {n} ist hoch.") for n in range(1, 9)])
    made = COMPRESS[compression](whole[: len(whole) * 3 // 4])
    (tmp_path / f"a.xml{compression}").write_bytes(made)
    kept, dropped = read(tmp_path / f"a.xml{compression}", tmp_path)
    assert texts(kept) == [f"Berg {n} ist hoch." for n in range(1, len(kept) + 1)] and len(kept) > 3
    assert list(reasons(dropped).values()) == ["broken XML"]


def test_xml_that_is_no_dump_is_named(tmp_path):
    (tmp_path / "a.xml").write_text("<project><name>x</name></project>")
    laughs = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10 if n else "ha"}">' for n in range(12))
    (tmp_path / "b.xml").write_text(f"<!DOCTYPE x [{laughs}]><mediawiki><siteinfo>&a11;</siteinfo></mediawiki>")
    (tmp_path / "c.txt").write_text("fine")
    kept, dropped = read(tmp_path, tmp_path)
    assert texts(kept) == ["fine"]
    assert sorted(reasons(dropped).values()) == ["broken XML", "not a MediaWiki dump"]


def test_a_page_whose_date_or_number_is_none_is_named(tmp_path):
    whole = wiki([(f"Berg {n}", 0, None, f"Berg {n} ist hoch.") for n in range(1, 5)]).decode()
    first, *rest = whole.split("<timestamp>2")
    (tmp_path / "date.xml").write_text(first + "<timestamp>x" + "<timestamp>2".join(rest))
    kept, dropped = read(tmp_path / "date.xml", tmp_path / "1")
    assert texts(kept) == [f"Berg {n} ist hoch." for n in (2, 3, 4)]
    assert reasons(dropped) == {"date.xml:1": "broken XML"}

    (tmp_path / "number.xml").write_text(whole.replace("<title>Berg 3</title><ns>0", "<title>Berg 3</title><ns>none"))
    kept, dropped = read(tmp_path / "number.xml", tmp_path / "2")
    assert texts(kept) == ["Berg 1 ist hoch.", "Berg 2 ist hoch."]
    assert reasons(dropped) == {"number.xml:3": "broken XML"}


def test_memory_does_not_grow_with_the_pages_of_a_dump():
    import mwxml
    from mwxml.element_iterator import ElementIterator

    root = ElementIterator.from_file(io.BytesIO(wiki([("Berg", 0, None, "x")] * 9)))
    for _ in mwxml.Dump.from_element(root):
        root.element.clear()
        assert len(root.element) <= 1  # what MediaWikiReader relies on


def test_wikitext_that_is_malformed_is_still_text():
    plain = PlainWiki(())
    assert plain("'''bold [[link|") and plain("{{{{") is not None
    assert plain("[[File:a.jpg|thumb|[[File:b.jpg]] words]] rest") == "rest"


# ---------------------------------------------------------------------------------------------------------------------
# Folders and URLs


def test_loops_of_links_end_and_are_named(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    for path in (folder, f"{folder}/**/*.txt"):
        kept, dropped = read(path, tmp_path / str(len(str(path))))
        assert texts(kept) == ["a"]
        assert list(reasons(dropped).values()) == ["unreadable"]
    with pytest.raises(UsageError, match="there is no file or folder"):
        find_source(str(folder / "self.txt"))


@pytest.fixture
def served(tmp_path):
    """A folder behind HTTP on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_behind_a_url_is_read(served, tmp_path, workers):
    folder, url = served
    (folder / "books.jsonl.gz").write_bytes(gzip.compress(jsonl([{"text": text} for text in TEXTS])))
    kept, dropped = read(f"{url}/books.jsonl.gz", tmp_path, workers=workers)
    assert texts(kept) == TEXTS and not dropped
    assert next(iter(kept)) == "books.jsonl.gz:1"


def test_a_url_with_nothing_behind_it_or_no_host_is_one_sentence(served, tmp_path):
    _, url = served
    with pytest.raises(UsageError, match="there is nothing at"):
        find_source(f"{url}/nothing.txt")
    with pytest.raises(UsageError, match="format that cannot be read"):
        find_source(f"{url}/")
    with pytest.raises(MachineError, match="cannot be had"):
        find_source("http://127.0.0.1:9/a.txt")
    with pytest.raises(UsageError, match="nonsense"):
        find_source("nonsense://a.txt")


def test_folders_and_globs_behind_a_url_are_read_and_a_change_there_is_noticed(tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe(
        {
            "/shelf/a.txt": b"a",
            "/shelf/deep/b.jsonl": jsonl([{"text": "b"}]),
            "/shelf/c.png": b"",
            "/shelf/.d.txt": b"d",
        }
    )
    try:
        source = find_source("memory://shelf")
        assert [file.name for file in source.files] == ["a.txt", "deep/b.jsonl"] and source.ignored == {".png": 1}
        kept, _ = read("memory://shelf", tmp_path)
        assert texts(kept) == ["a", "b"] and list(kept) == ["shelf/a.txt", "shelf/deep/b.jsonl:1"]
        kept, _ = read("memory://shelf/*.txt", tmp_path / "glob")
        assert texts(kept) == ["a"]
        before = digests([source], tmp_path / "memory.json")
        assert digests([find_source("memory://shelf")], tmp_path / "memory.json") == before
        system.pipe("/shelf/a.txt", b"another")
        assert digests([find_source("memory://shelf")], tmp_path / "memory.json") != before
        with pytest.raises(DataError, match="holds nothing that can be read"):
            system.mkdir("/bare")
            find_source("memory://bare")
    finally:
        system.rm("/shelf", recursive=True)


def test_every_format_has_one_reader_and_a_missing_package_is_named(tmp_path, monkeypatch):
    assert sorted(reader.format for reader in READERS) == sorted(set(FORMATS.values()))
    assert format_of("a.parquet.gz") is None and format_of("A.JSONL.GZ") == "jsonl" and format_of("a.tgz") == "tar"
    (tmp_path / "a.html").write_text(PAGE)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trafilatura" else real(name))
    with pytest.raises(MachineError, match=r"trafilatura is not installed; run: pip install 'hfscratch\[web\]'"):
        corpus.plan_reading([find_source(str(tmp_path))])


def test_options_of_the_hub_are_refused_for_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for option, value in (("config", "x"), ("revision", "y"), ("streaming", True), ("max_documents", 5)):
        with pytest.raises(UsageError, match=f"{option} is {value}, which is for datasets of the Hub"):
            find_source(str(tmp_path), **{option: value})


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
def test_a_large_file_of_text_is_read_in_parts_and_no_character_is_lost(tmp_path, name, monkeypatch):
    from hfscratch.data.readers import pages

    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 50_000)
    monkeypatch.setattr(pages, "PART_BYTES", 20_000)
    paragraphs = [f"Paragraph {number}: “naïve” words.\nSecond line." for number in range(3000)]
    paragraphs.insert(1000, "é" * 45_000)  # no line ends for longer than a part
    whole = "\n\n".join(paragraphs)
    (tmp_path / name).write_bytes(COMPRESS[".zst" if "zst" in name else ""](whole.encode()))
    kept, dropped = read(tmp_path / name, tmp_path)
    assert not dropped and list(kept)[:2] == [f"{name}:1", f"{name}:2"]
    assert max(row["size_bytes"] for row in kept.values()) <= 20_000
    without_ends = "".join(row["text"] for row in kept.values()).replace("\n", "")
    assert without_ends == whole.replace("\n", "")
    assert list(kept.values())[1]["text"].startswith("Paragraph")


def test_a_pipe_in_a_folder_is_passed_over_and_counted(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    os.mkfifo(folder / "pipe.txt")
    assert find_source(str(folder)).ignored == {"pipes, sockets and devices": 1}
    kept, _ = read(folder, tmp_path)
    assert texts(kept) == ["a"]
    with pytest.raises(UsageError, match="is not a regular file"):
        find_source(str(folder / "pipe.txt"))
