"""What a tokenizer is worth: how much text a token holds, beside another's, and which entries earn their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hfscratch.errors import UsageError
from hfscratch.tokens.sample import Sample
from hfscratch.tokens.tokenizer import CONTINUATION, encode_documents, special_tokens_as_text

RARE = 100
"""An entry that the train split has less often than this learns little: each time is one step of its embedding."""
NUM_EXAMPLES = 20
COMPARED_BYTES = 10_000_000
"""Text on which two tokenizers are compared."""


def usage(tokenizer: Any, uses: np.ndarray) -> dict[str, Any]:
    """Which entries of the vocabulary the train split never has, and which hardly ever.

    Args:
        uses: how often each id stands in the train split, (ids,).
    """
    from tokenizers.pre_tokenizers import ByteLevel

    special = set(tokenizer.all_special_ids)
    entries = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
    unused = sorted(number for number in entries if uses[number] == 0)
    rare = sorted((number for number in entries if 0 < uses[number] < RARE), key=lambda number: (uses[number], number))
    letters = set(ByteLevel.alphabet())
    is_byte = {number for number in unused if entries[number].removeprefix(CONTINUATION) in letters}
    words = [number for number in unused if number not in is_byte]
    texts = {number: shown(tokenizer, number) for number in entries}
    longest = sorted(entries, key=lambda number: (-len(texts[number].encode()), number))[:NUM_EXAMPLES]
    return {
        "entries": len(entries),
        "unused": {
            "entries": len(unused),
            "single_bytes": len(is_byte),
            "examples": [texts[number] for number in words[:NUM_EXAMPLES]],
        },
        "undertrained": {
            "fewer_than": RARE,
            "entries": len(rare),
            "examples": [[texts[number], int(uses[number])] for number in rare[:NUM_EXAMPLES]],
        },
        "longest": [[texts[number], int(uses[number])] for number in longest],
    }


def shown(tokenizer: Any, number: int) -> str:
    """An entry as text; a part of a character, which is none, as the vocabulary writes it."""
    text = str(tokenizer.backend_tokenizer.decode([number], skip_special_tokens=False))
    return str(tokenizer.convert_ids_to_tokens(number)) if "\ufffd" in text or not text else text


def find_compared(place: Path) -> Path:
    """The tokenizer.json of another tokenizer: the file itself, or the one in a folder. Raises: UsageError."""
    from tokenizers import Tokenizer

    path = place.expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"tokenizer.compare_with is {place}, and there is no tokenizer.json there")
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception
        raise UsageError(f"tokenizer.compare_with: {path} is no tokenizer.json: {error}") from None
    return path


def compare(tokenizer: Any, path: Path, sample: Sample) -> dict[str, dict[str, int]]:
    """`{source: {"bytes": …, "ours": …, "theirs": …}}`: tokens of the same text, without those that begin and end one.

    Args:
        path: the other's tokenizer.json.
    """
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    theirs.no_truncation()
    theirs.no_padding()
    found: dict[str, dict[str, int]] = {}
    remaining = sample.with_sources()
    with special_tokens_as_text(tokenizer):
        while batch := list(islice(remaining, 64)):
            texts = [text for text, _ in batch]
            ours = encode_documents(tokenizer, texts)
            others = theirs.encode_batch_fast(texts, add_special_tokens=False)
            for (text, source), one, other in zip(batch, ours, others, strict=True):
                counts = found.setdefault(source, {"bytes": 0, "ours": 0, "theirs": 0})
                counts["bytes"] += len(text.encode())
                counts["ours"] += len(one) - 2
                counts["theirs"] += len(other)
    return found


def totals(compared: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The sum of all sources."""
    return {name: sum(each[name] for each in compared.values()) for name in ("bytes", "ours", "theirs")}


def write_report(metrics: Mapping[str, Any], way_back: str) -> str:
    """What the metrics of the stage say, in Markdown."""
    lines = [f"# Tokenizer: {metrics['algorithm']}", "", f"{metrics['vocab_size']:,} entries."]
    if sample := metrics.get("sample"):
        size = f"{sample['documents']:,} documents, {sample['bytes']:,} bytes of the train split"
        lines += ["", f"Trained on {size}:", "", "| source | documents | bytes |", "|---|---:|---:|"]
        for source, each in sample["sources"].items():
            lines.append(f"| {_cell(source)} | {each['documents']:,} | {each['bytes']:,} |")
    lines += ["", "## Bytes a token", "", "Tokens that begin and end a document included.", ""]
    splits = list(metrics["bytes_per_token"])
    lines += [f"| source | {' | '.join(splits)} |", "|---|" + "---:|" * len(splits)]
    for source in sorted({source for split in splits for source in metrics["by_source"][split]}):
        found = [metrics["by_source"][split].get(source) for split in splits]
        cells = [f"{each['bytes'] / each['tokens']:.3f}" if each else "" for each in found]
        lines.append(f"| {_cell(source)} | {' | '.join(cells)} |")
    lines.append("| all | " + " | ".join(f"{each:.3f}" for each in metrics["bytes_per_token"].values()) + " |")
    if compared := metrics.get("compared"):
        name = _cell(compared["with"])
        lines += [
            "",
            f"## Beside {name}",
            "",
            f"On the same {compared['all']['bytes']:,} bytes of the {compared['split']} split, without the tokens that "
            f"begin and end a document; {name} has {compared['vocab_size']:,} entries.",
            "",
            f"| source | bytes a token | {name} | tokens here for one of {name} |",
            "|---|---:|---:|---:|",
        ]
        for source, each in [*compared["sources"].items(), ("all", compared["all"])]:
            ours, theirs = each["bytes"] / max(1, each["ours"]), each["bytes"] / max(1, each["theirs"])
            lines.append(
                f"| {_cell(source)} | {ours:.3f} | {theirs:.3f} | {each['ours'] / max(1, each['theirs']):.3f} |"
            )
    used = metrics["usage"]
    unused, rare = used["unused"], used["undertrained"]
    of_these = f", {unused['single_bytes']:,} of them single bytes, which stand there for texts to come"
    lines += [
        "",
        "## Tokens and back",
        "",
        f"{way_back}.",
        "",
        "## Entries",
        "",
        f"- Never in the tokens of the train split: {unused['entries']:,} of {used['entries']:,}"
        + f"{of_these if unused['single_bytes'] else ''}.{_listed(map(repr, unused['examples']))}",
        f"- There fewer than {rare['fewer_than']} times, so that little is learnt of them: {rare['entries']:,}."
        + _listed(f"{text!r} ({count})" for text, count in rare["examples"]),
        "- The longest:" + _listed(f"{text!r} ({count:,})" for text, count in used["longest"]),
    ]
    return "\n".join(lines) + "\n"


def _listed(examples: Iterable[str]) -> str:
    """Examples behind a sentence, as code, so that Markdown changes nothing in them."""
    texts = [f"`` {text} ``" for text in examples]
    return " " + ", ".join(texts) if texts else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
