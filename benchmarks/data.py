"""The data stage on text of several sizes: how fast it is, and how much memory each of its processes takes.

    python benchmarks/data.py                               # 64, 256 and 1,000 MB on two workers, some 10 GB of disk
    python benchmarks/data.py --clean                       # takes out repeated lines and paragraphs, and boilerplate
    python benchmarks/data.py --megabytes 16 --loaded       # to see that it works

The text is made, always the same, of the Python standard library's sources: runs of lines in which half of the words
are replaced, so that few documents are alike. 5 % are copies, 5 % near-copies with 2 % of their words changed, 2 % hold
a run of 120 words of another document, and 10 % begin with the same licence. The stage runs with its defaults, as
`hfscratch data` in a process of its own. Memory is the proportional set size (PSS) of every process, ten times a
second: what forked processes share is divided among them. Linux only. A loaded machine is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import machine

GOAL_GB = 1.5
COPIES, NEAR_COPIES, LEAKS, LICENSED = 0.05, 0.05, 0.02, 0.1
FILE_BYTES = 8_000_000
PHASE = re.compile(rb"(read|clean|sign|compare|screen|write):")
POLL_S = 0.1


def make_documents(num_bytes: int) -> Iterator[str]:
    """Documents of 1 to 20 kB, until they are so many bytes together."""
    chance = random.Random(0)
    lines = [
        line
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    ]
    pieces = [re.split(r"(\w+)", line) for line in lines]  # words are at odd places
    words = sorted({word for piece in pieces for word in piece[1::2]})
    licence = " ".join(chance.choices(words, k=120)) + "\n\n"
    recent: list[str] = []
    made = 0
    while made < num_bytes:
        kind = chance.random()
        if recent and kind < COPIES + NEAR_COPIES:
            text = chance.choice(recent)
            if kind >= COPIES:
                parts = re.split(r"(\w+)", text)
                for place in range(1, len(parts), 2):
                    if chance.random() < 0.02:
                        parts[place] = chance.choice(words)
                text = "".join(parts)
        else:
            start, size = chance.randrange(len(pieces)), chance.randint(1_000, 20_000)
            parts, length = [], 0
            while length < size:
                piece = list(pieces[start % len(pieces)])
                for place in range(1, len(piece), 2):
                    if chance.random() < 0.5:
                        piece[place] = chance.choice(words)
                parts.append("".join(piece))
                length += len(parts[-1])
                start += 1
            text = "".join(parts)
            if chance.random() < LICENSED:
                text = licence + text
            if recent and kind > 1 - LEAKS:
                text += " ".join(chance.choice(recent).split()[40:160]) + "\n"
            recent = [*recent[-500:], text]
        made += len(text.encode())
        yield text


def write(folder: Path, num_bytes: int) -> tuple[int, int]:
    """Writes the documents as .jsonl files; gives how many they are, and the bytes of their text."""
    folder.mkdir(parents=True)
    documents = size = number = 0
    file = None
    for text in make_documents(num_bytes):
        if file is None or file.tell() > FILE_BYTES:
            if file is not None:
                file.close()
            file = (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8")
            number += 1
        file.write(json.dumps({"text": text}) + "\n")
        documents += 1
        size += len(text.encode())
    if file is not None:
        file.close()
    return documents, size


def pss(pid: int) -> int:
    """Bytes of memory of a process, its part of what it shares; 0 if it is gone."""
    try:
        with Path(f"/proc/{pid}/smaps_rollup").open("rb") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:")), 0)
    except OSError:
        return 0


def run(recipe: Path, errors: Path) -> tuple[float, dict[str, list[float]]]:
    """Runs the stage; gives its seconds, and by phase the peak bytes (parent, worker, all together) and the seconds."""
    import psutil

    peaks: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    started = last = time.perf_counter()
    with errors.open("wb") as stderr:
        stage = psutil.Popen([sys.executable, "-m", "hfscratch", "data", str(recipe)], stderr=stderr, stdout=stderr)
    while stage.poll() is None:
        time.sleep(POLL_S)
        try:
            children = [child.pid for child in stage.children(recursive=True)]
        except psutil.Error:
            continue
        with errors.open("rb") as text:
            text.seek(max(0, errors.stat().st_size - 400))
            phases = PHASE.findall(text.read())
        own, others = pss(stage.pid), [pss(child) for child in children]
        peak = peaks[phases[-1].decode() if phases else "start"]
        now = time.perf_counter()
        peak[:] = [*map(max, peak, (own, max(others, default=0), own + sum(others))), peak[3] + now - last]
        last = now
    seconds = time.perf_counter() - started
    if stage.returncode:
        raise SystemExit(f"the stage failed: {errors.read_text(errors='replace')[-3000:]}")
    return seconds, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the text and the runs go for a while")
    parser.add_argument("--clean", action="store_true", help="take out repeated lines, paragraphs and boilerplate too")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    if not arguments.loaded:
        machine.require_idle()
    print(machine.describe(arguments.workers, "datatrove", "pyarrow", "numpy"))
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            documents, size = write(folder / "text", megabytes * 1_000_000)
            section = {"sources": [{"path": str(folder / "text"), "code": False}], "workers": arguments.workers}
            if arguments.clean:
                section |= {
                    "normalise": {"boilerplate_documents": 0.05},
                    "dedup": {"lines": True, "paragraphs": True},
                }
            recipe = folder / "recipe.yaml"
            recipe.write_text(json.dumps({"out": str(folder / "run"), "data": section}))
            seconds, peaks = run(recipe, folder / "stderr.txt")
            manifest = json.loads((folder / "run" / "data" / "manifest.json").read_text())
            print(f"\n{size / 1e6:.0f} MB, {documents:,} documents: {seconds:.0f} s, {size / 1e6 / seconds:.2f} MB/s")
            print(f"  fates {manifest['metrics']['fates']}, dropped {manifest['metrics']['reasons']}")
            print("  peak MB     parent  worker  together  seconds")
            for phase, (own, worker, together, spent) in peaks.items():
                print(f"  {phase:10} {own / 1e6:7.0f} {worker / 1e6:7.0f} {together / 1e6:9.0f} {spent:8.0f}")
            most = max(max(peak[:2]) for peak in peaks.values()) / 1e9
            print(f"  the largest process: {most:.2f} GB (goal: at most {GOAL_GB} GB, at every size)", flush=True)


if __name__ == "__main__":
    main()
