"""Which files a source is, and their digests."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import pytest

from hfscratch.data import digests, distinct_labels, find_source
from hfscratch.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "docs"
    for name in ("b.md", "a.TXT", "deep/c.py", "deep/d.jsonl.gz", "deep/picture.png", "Makefile"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in (".hidden.txt", ".git/config.txt", "runs/x/.work/data/sources.json", "runs/x/data/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def names(source):
    return [file.name for file in source.files]


def test_a_folder_is_its_files_of_known_formats_in_order_and_others_are_counted(folder):
    source = find_source(str(folder))
    assert names(source) == ["a.TXT", "b.md", "deep/c.py", "deep/d.jsonl.gz"]
    assert source.ignored == {".png": 1, "no extension": 1}
    assert source.label == "docs"


def test_run_folders_inside_a_corpus_are_not_part_of_it(folder):
    assert not [name for name in names(find_source(str(folder))) if "runs" in name]


def test_a_folder_that_is_itself_named_is_read_though_a_run_was_once_begun_in_it(folder):
    before = names(find_source(str(folder)))
    (folder / ".work").mkdir()
    assert names(find_source(str(folder))) == before
    assert names(find_source(f"{folder}/*.md")) == ["b.md"]


@pytest.mark.parametrize("pattern", ["**/*", "**", "*/*", "*/*/*/*", "**/README.md", "ru*/x/**/*", "***/*.md"])
def test_a_glob_passes_over_what_a_folder_does(folder, pattern):
    (folder / "linked").symlink_to(folder / "deep")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "deep" / "link.txt").symlink_to(folder / "b.md")
    listed = names(find_source(str(folder)))
    assert "deep/link.txt" in listed
    try:
        found = names(find_source(f"{folder}/{pattern}"))
    except UsageError as error:
        assert "no file matches" in str(error)
        found = []
    assert set(found) <= set(listed)
    if pattern.startswith("**") and pattern.endswith("*"):
        assert found == listed


def test_a_glob_finds_hidden_files_only_where_it_says_so(folder):
    assert names(find_source(f"{folder}/.*.txt")) == [".hidden.txt"]
    assert ".hidden.txt" not in names(find_source(f"{folder}/*"))


def test_a_glob_may_begin_at_a_linked_folder(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    assert names(find_source(f"{tmp_path}/linked/*.md")) == ["b.md"]


def test_a_glob_from_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names(find_source("*/*.py")) == ["deep/c.py"]
    assert names(find_source("**/*.md")) == ["b.md"]


def test_a_glob_is_what_it_matches(folder):
    source = find_source(f"{folder}/**/*.py")
    assert names(source) == ["deep/c.py"] and source.root == folder
    assert names(find_source(f"{folder}/*")) == ["a.TXT", "b.md"]


def test_a_single_file_is_named_by_itself(folder):
    source = find_source(str(folder / "b.md"))
    assert names(source) == ["b.md"] and source.prefix("b.md") == "b.md"


def test_the_standard_library_comes_without_its_tests():
    source = find_source("python-stdlib")
    assert "json/decoder.py" in names(source)
    assert len(source.files) > 300
    assert not [name for name in names(source) if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names(source))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "there is no file or folder ./nowhere"),
        ("nowhere/", "there is no file or folder nowhere/"),
        ("nowhere.jsonl", "there is no file or folder nowhere.jsonl"),
        ("a/b/c", "there is no file or folder a/b/c"),
        ("~no-such-user/x", "there is no file or folder ~no-such-user/x"),
        ("n" * 300, "there is no file or folder nnn"),
        ("deep/" + "n" * 300 + ".txt", "there is no file or folder deep/nnn"),
        ("{folder}/*/" + "n" * 300 + ".txt", "n.txt"),
        ("n/" * 3000, "there is no file or folder n/n/"),
        ("nowhere/*.txt", "no file matches"),
        ("{folder}/deep/*.png", "matches no file of a format that can be read"),
        ("{folder}/Makefile", "format that cannot be read; the formats are .txt .py .md .html"),
    ],
)
def test_what_does_not_exist_or_cannot_be_read_is_named(folder, path, message):
    path = path.format(folder=folder)
    with pytest.raises(UsageError) as caught:
        find_source(path)
    assert message in str(caught.value)


def test_a_folder_without_anything_to_read_says_what_it_holds(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"it holds 1 \.pdf"):
        find_source(str(tmp_path))


@pytest.mark.parametrize("path", ["roneneldan/TinyStories", "wikitext", "a-b/c.d_e"])
def test_what_looks_like_a_hub_id_and_is_not_on_disk_is_one(path):
    source = find_source(path, split="validation")
    assert source.hub_id == path and source.split == "validation"


def test_what_looks_like_a_hub_id_but_stands_on_the_disk_is_local(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert find_source("docs").hub_id is None


def test_two_sources_never_share_a_label(folder):
    found = distinct_labels([find_source(str(folder)), find_source(str(folder)), find_source(str(folder), name="docs")])
    assert [source.label for source in found] == ["docs", "docs-2", "docs-3"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_names_that_are_not_utf8_are_spelt_out_wherever_they_go(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in (b"a\xff.txt", b"b.x\xff"):
        (folder / os.fsdecode(name)).write_text("text")
    source = find_source(str(folder))
    assert source.label == "caf\\udce9" and source.ignored == {".x\\udcff": 1}
    assert find_source(str(folder / "a*.txt")).label == "caf\\udce9"
    assert find_source(str(folder / os.fsdecode(b"a\xff.txt"))).label == "a\\udcff.txt"


def test_digesting_makes_no_run_folder(folder, tmp_path):
    digests([find_source(str(folder))], tmp_path / "run" / ".work" / "data" / "sources.json")
    assert not (tmp_path / "run").exists()


def test_digests_are_of_the_content_and_follow_a_change(folder, tmp_path):
    memory = tmp_path / "work" / "sources.json"
    found = [find_source(str(folder))]
    before = digests(found, memory)
    assert before["0/b.md"] == hashlib.sha256(b"b.md").hexdigest()
    (folder / "b.md").write_text("other")
    after = digests([find_source(str(folder))], memory)
    assert {name for name in before if before[name] != after[name]} == {"0/b.md"}


def test_a_touched_file_keeps_its_digest_and_a_moved_corpus_too(folder, tmp_path):
    memory = tmp_path / "sources.json"
    before = digests([find_source(str(folder))], memory)
    os.utime(folder / "b.md")
    assert digests([find_source(str(folder))], memory) == before
    moved = folder.rename(tmp_path / "elsewhere")
    assert digests([find_source(str(moved))], memory) == before


def test_unchanged_files_are_not_read_again(folder, tmp_path):
    memory = tmp_path / "sources.json"
    before = digests([find_source(str(folder))], memory)
    status = (folder / "b.md").stat()
    (folder / "b.md").write_text("B.MD")  # the same size
    os.utime(folder / "b.md", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests([find_source(str(folder))], memory) == before


def test_a_damaged_memory_of_digests_only_costs_time(folder, tmp_path):
    memory = tmp_path / "sources.json"
    before = digests([find_source(str(folder))], memory)
    memory.write_text("{")
    assert digests([find_source(str(folder))], memory) == before


def test_digests_of_the_unchanged_standard_library_take_a_moment(tmp_path):
    memory = tmp_path / "sources.json"
    digests([find_source("python-stdlib")], memory)
    fastest = min(_seconds(lambda: digests([find_source("python-stdlib")], memory)) for _ in range(3))
    assert fastest < 0.3


def _seconds(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def test_listing_and_digesting_import_nothing_heavy():
    program = (
        "import sys; from hfscratch.stages import data; from hfscratch.data import inspect, digests; "
        "print([m for m in ('torch', 'datasets', 'datatrove', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"
