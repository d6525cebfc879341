"""Signing documents for near-copies: datatrove's MinHash step against ours, on one core, in turns.

    pip install spacy && python benchmarks/minhash.py     # datatrove's word tokenizer of English is spaCy's
    python benchmarks/minhash.py --rounds 1 --loaded      # to see that it works

The corpus is the Python standard library's sources; both make 112 permutations (16 bands of 7) of the 5-grams of every
document's words. The shingles differ, because the words do (spaCy's against runs of letters and digits); for the same
shingles the signatures are equal, which tests/data/test_minhash.py proves. A loaded machine is refused.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=1.0, help="of text a round (default: 1)")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    if not arguments.loaded:
        machine.require_idle()

    import xxhash
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    from hfscratch.data.minhash import NearCopies, Signer

    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if size < arguments.megabytes * 1e6:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1].encode())
    with tempfile.TemporaryDirectory() as folder:
        config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=7, hash_config=HashConfig(precision=64))
        theirs = MinhashDedupSignature(f"{folder}/theirs", config=config)
        # datatrove 0.10 hands strings to xxhash, which from version 4 on takes bytes alone.
        theirs._hash_func = lambda shingle: xxhash.xxh64_intdigest(shingle.encode())
        ours = Signer(Path(folder) / "ours", NearCopies(threshold=0.8, ngram=5, bands=16, rows=7))
        speeds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(arguments.rounds):
            for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                documents = [Document(text=text, id=str(position)) for position, text in enumerate(texts)]
                started = time.perf_counter()
                for _ in (ours if name == "ours" else theirs).run(iter(documents), 0, 1) or ():
                    pass
                speeds[name].append(size / 1e6 / (time.perf_counter() - started))
    middle, low, high = machine.compare(speeds["ours"], speeds["theirs"])
    print(machine.describe(1, "datatrove", "numpy"))
    print(f"{size / 1e6:.1f} MB: ours {max(speeds['ours']):.1f} MB/s, datatrove {max(speeds['theirs']):.2f} MB/s")
    print(f"ours / datatrove: {middle:.1f} (quartiles {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
