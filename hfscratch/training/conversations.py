"""Instruction data as it is found: chat `messages`, `prompt` and `completion`, or alpaca's columns.

Reads .json (an array or lines), .jsonl, both also as .gz, and .parquet, from a file, a folder or the Hub. It knows no
tokenizer: an example is a list of messages, or two pieces of text to be joined as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfscratch import artifact
from hfscratch.errors import DataError
from hfscratch.training import tables

EXTENSIONS = tables.RECORDS
LAYOUTS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""The columns that make each layout; alpaca's `input` may be missing."""
NEEDED = "`messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One example to learn an answer from.

    Attributes:
        messages: the conversation; the assistant's turns are the answers. Empty if `prompt` is text.
        prompt: text that `completion` continues, as they are.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def question(self) -> str:
        """What comes before the last answer, as a key: examples with one question belong to the same split."""
        before = self.messages[:-1] if self.messages else self.prompt
        return artifact.digest_json(before)

    @property
    def answer(self) -> str:
        """The last answer."""
        return str(self.messages[-1]["content"]) if self.messages else self.completion


def read_examples(path: str, split: str = "train") -> tuple[list[Example], dict[str, int]]:
    """The examples of a file, a folder or a Hub dataset, in order, and `{reason: count}` of the rows left out.

    Raises: DataError if a file cannot be read, columns are not as needed, or no example is left.
    """
    files = tables.files_of(path, EXTENSIONS)
    batches = [(str(each), list(tables.read_rows(each))) for each in files]
    if not files:
        batches = [(path, list(tables.hub_dataset(path, split)))]
    examples: list[Example] = []
    left_out: dict[str, int] = {}
    for where, rows in batches:
        if not rows:
            continue
        layout = _layout(rows, where)
        for number, row in enumerate(rows, start=1):
            try:
                example = _example(row, layout)
            except ValueError as error:
                raise DataError(f"finetune.data: row {number} of {where}: {error}") from None
            if isinstance(example, str):
                left_out[example] = left_out.get(example, 0) + 1
            else:
                examples.append(example)
    if not examples:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items()) or "it has no rows"
        raise DataError(f"finetune.data: {path} gives no example to learn from ({reasons})")
    return examples, left_out


def _layout(rows: Sequence[Any], where: str) -> str:
    if not isinstance(rows[0], dict):
        raise DataError(f"finetune.data: {where} holds {type(rows[0]).__name__}s, not records with {NEEDED}")
    columns = list(rows[0])
    for layout, needed in LAYOUTS.items():
        if set(needed) <= set(columns):
            return layout
    raise DataError(f"finetune.data: {where} has the columns {', '.join(columns) or '(none)'}; it needs {NEEDED}")


def _example(row: Any, layout: str) -> Example | str:
    """The example in a row, or the reason to leave it out. Raises: ValueError for a row of another form."""
    if not isinstance(row, dict) or not set(LAYOUTS[layout]) <= row.keys():
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"it has {found}; the rows before it have {', '.join(LAYOUTS[layout])}")
    if layout == "messages":
        return _conversation(row["messages"])
    if layout == "alpaca":
        instruction, given, output = (_text(row, key) for key in ("instruction", "input", "output"))
        if not output.strip():
            return "the answer is empty"
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        return _conversation([{"role": "user", "content": question}, {"role": "assistant", "content": output}])
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _conversation([*row["prompt"], *row["completion"]])
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion.strip():
        return "the answer is empty"
    return Example(prompt=prompt, completion=completion)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"its {key} is of type {type(value).__name__}, not text")
    return value or ""


def _conversation(messages: Any) -> Example | str:
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError("its messages are not a list of {role, content}")
    kept = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"a message has the role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"the {role}'s content is of type {type(content).__name__}, not text")
        kept.append({"role": role, "content": content})
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()  # nothing to learn behind the last answer
    if not kept:
        return "no assistant turn"
    if not kept[-1]["content"].strip():
        return "the answer is empty"
    return Example(messages=tuple(kept))
