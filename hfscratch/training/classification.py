"""Texts and their labels: read, split so that none stands on two sides, encoded, and learnt by transformers' Trainer.

One label a text, from one text column. Pairs of texts, several labels a text and regression are not covered.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hfscratch.errors import DataError, UsageError
from hfscratch.training import tables
from hfscratch.training.examples import TooLong
from hfscratch.training.exceptions import exception_clauses, fit_around_hole
from hfscratch.training.trainer import TrainerMixin

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The words in file names, and names of Hub splits, that say which split it is. Source: those of `load_dataset`."""
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "comment", "tweet", "question", "query", "body")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic")
"""What columns are usually called; the first that is there is taken."""
MIN_CLAUSES = 20
"""An exception that fewer training examples catch, equal ones counted once, is none to learn from."""
ENCODED_AT_ONCE = 1000


@dataclass(frozen=True)
class LabelledText:
    """A text and its label."""

    text: str
    label: str
    id: str = ""

    @property
    def key(self) -> str:
        """The text, as white space does not change it: texts with one key belong to the same split."""
        return " ".join(self.text.split())


@dataclass(frozen=True)
class EncodedText:
    """The ids of a text, and the number of its label."""

    input_ids: list[int]
    labels: int


@dataclass(frozen=True)
class LabelledTexts:
    """Texts in their splits, before a tokenizer has seen them.

    Attributes:
        splits: by split.
        labels: in the order of their numbers.
        counts: by split, what was found and what left out.
        has_holes: whether the texts are pieces of `read_clauses`, of which both ends are cut, to keep the hole.
    """

    splits: dict[str, list[LabelledText]]
    labels: list[str]
    counts: dict[str, dict[str, int]]
    has_holes: bool = False

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """`{split: {label: texts}}`."""
        found = {split: Counter(each.label for each in texts) for split, texts in self.splits.items()}
        return {split: {label: each[label] for label in self.labels} for split, each in found.items()}

    @property
    def shares(self) -> str:
        """How the labels are shared out among the training texts, the most frequent first."""
        counts = self.label_counts["train"]
        order = sorted(counts, key=lambda label: -counts[label])
        told = ", ".join(f"{label} {counts[label] / sum(counts.values()):.1%}" for label in order[:6])
        rest = f", {len(order) - 6} more down to {counts[order[-1]]:,} texts" if len(order) > 6 else ""
        return f"{len(order)}: {told}{rest}"

    @property
    def frequent_label(self) -> str:
        """The most frequent of the train split."""
        counts = self.label_counts["train"]
        return max(self.labels, key=lambda label: counts[label])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_texts(
    path: str,
    split: str = "train",
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    needs_train: bool = True,
) -> tuple[dict[str, list[LabelledText]], list[str], dict[str, int]]:
    """The texts of a file, a folder or a Hub dataset.

    Files of a folder whose names say a split (`train.tsv`, `dev-0.jsonl`) are that split's, as are a Hub dataset's
    splits; where none does, all are training texts.

    Args:
        split: of a Hub dataset, the one to train on.
        needs_train: whether texts that are held out are not enough.

    Returns: texts by split; the labels in their order, where the Hub knows one; `{reason: rows left out}`.

    Raises: DataError if a file cannot be read, has no such columns, or no text is left.
    """
    named: list[tuple[str, str, Any]] = []  # split, place, rows
    order: list[str] = []
    files = tables.files_of(path, tables.EXTENSIONS)
    if files:
        said = {file: _split_of(file) for file in files}
        is_split = Path(path).expanduser().is_dir() and any(said.values())
        if needs_train and is_split and "train" not in said.values():
            raise DataError(f"finetune.data: {path} has no file for train ({', '.join(each.name for each in files)})")
        for file in files:
            if is_split and said[file] is None:
                raise DataError(
                    f"finetune.data: {file.name} in {path} belongs to no split, and the other files do; call it "
                    "train…, validation… or test…, or move it away"
                )
            named.append((said[file] or "train" if is_split else "train", str(file), list(tables.read_rows(file))))
    else:
        for name, dataset in tables.hub_dataset(path, None).items():
            belongs = "train" if name == split else SPLIT_NAMES.get(name)
            if belongs and (belongs != "train" or name == split):
                named.append((belongs, f"{path}, {name}", dataset))
        if not any(belongs == "train" for belongs, _, _ in named):
            raise UsageError(f"finetune.data_split is '{split}', and {path} has no such split")
    found: dict[str, list[LabelledText]] = {}
    left_out: Counter[str] = Counter()
    for belongs, place, rows in named:
        texts, names = _texts(rows, place, text_column, label_column, left_out)
        found.setdefault(belongs, []).extend(texts)
        order = names or order
    if not (found.get("train") if needs_train else any(found.values())):
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items()) or "it has no rows"
        raise DataError(f"finetune.data: {path} gives no text{' to learn from' if needs_train else ''} ({reasons})")
    return found, order, dict(left_out)


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _texts(
    rows: Any, place: str, text_column: str | None, label_column: str | None, left_out: Counter[str]
) -> tuple[list[LabelledText], list[str]]:
    """The texts of one file or split, and the names of its labels if it is a Hub dataset that knows them."""
    if not len(rows):
        return [], []
    if not isinstance(rows[0], dict):
        raise DataError(f"finetune.data: {place} holds {type(rows[0]).__name__}s, not records with a text and a label")
    columns = list(rows[0])
    text_name = _column(columns, text_column, TEXT_COLUMNS, "text", place)
    label_name = _column(columns, label_column, LABEL_COLUMNS, "label", place)
    feature = getattr(rows, "features", {}).get(label_name)
    names = list(getattr(feature, "names", None) or [])
    texts = []
    for number, row in enumerate(rows, start=1):
        where = f"finetune.data: row {number} of {place}"
        if not isinstance(row, dict) or not {text_name, label_name} <= row.keys():
            raise DataError(f"{where} lacks the column '{text_name}' or '{label_name}', which the first row has")
        text, label = row[text_name], row[label_name]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: its {text_name} is of type {type(text).__name__}, not text")
        if names and isinstance(label, int):
            label = names[label] if 0 <= label < len(names) else None  # the Hub's -1 stands for none
        if text is None or not text.strip():
            left_out["the text is empty"] += 1
        elif label is None or label != label or not str(label).strip():  # only NaN is not itself
            left_out["there is no label"] += 1
        else:
            texts.append(LabelledText(text, _label(label, where, label_name)))
    return texts, names


def _column(columns: Sequence[str], asked: str | None, usual: Sequence[str], what: str, place: str) -> str:
    listed = ", ".join(columns) or "(none)"
    if asked is not None:
        if asked not in columns:
            raise DataError(f"finetune.{what}_column is '{asked}', and {place} has the columns {listed}")
        return asked
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise DataError(
            f"finetune.data: {place} has the columns {listed}; say which of them holds the {what} as "
            f"finetune.{what}_column"
        )
    return found


def _label(value: Any, where: str, column: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: its {column} is {value!r}; a label is a word or a whole number")
    return str(value).strip()


def read_clauses(documents: Mapping[str, Iterable[tuple[str, str]]]) -> dict[str, list[LabelledText]]:
    """The `except` clauses of a data artifact's splits; only exceptions that there is enough of in the train split.

    Args:
        documents: `(id, text)` of the splits train, validation and test.

    Raises: DataError if fewer than two exceptions are left.
    """
    found = {
        split: [
            LabelledText(piece, name, f"{identifier}:{line}")
            for identifier, text in documents[split]
            for line, piece, name in exception_clauses(text)
        ]
        for split in SPLITS
    }
    # A piece counts once, and only where it is not held out too: the others are not learnt from.
    held_out = {each.key for split in ("validation", "test") for each in found[split]}
    learnt = {each.key: each.label for each in reversed(found["train"]) if each.key not in held_out}
    counts = Counter(learnt.values())
    known = {name for name, count in counts.items() if count >= MIN_CLAUSES}
    if len(known) < 2:
        raise DataError(
            f"the train split catches {len(known)} exceptions {MIN_CLAUSES} times or more, equal clauses counted once, "
            "and it takes two to tell apart; take more Python code, or finetune.task=classification with data of your "
            "own"
        )
    return {split: [each for each in texts if each.label in known] for split, texts in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def split_texts(
    found: Mapping[str, Sequence[LabelledText]],
    order: Sequence[str] = (),
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> LabelledTexts:
    """Every text once and on one side; a split that is not given, or has no labels, is cut from the training texts,
    label by label.

    Which texts are held out follows from their hash and the seed, not from the order of the rows.

    Args:
        order: of the labels, where it is known; else numbers come by size and words by the alphabet.

    Raises: DataError if there is one label only, or a held-out one that no training text has.
    """
    kept: dict[str, dict[str, LabelledText]] = {}
    counts: dict[str, dict[str, int]] = {}
    for split in ("test", "validation", "train"):  # what is held out is held out
        texts, count = found.get(split, ()), Counter[str]()
        kept[split] = {}
        for each in texts:
            key = each.key
            before = kept[split].get(key)
            if before is not None:
                count["repeated" if before.label == each.label else "repeated with another label"] += 1
            elif any(key in others for other, others in kept.items() if other != split):
                count["held out too"] += 1
            else:
                kept[split][key] = each
        counts[split] = {"found": len(texts), **count}
    by_label: dict[str, list[str]] = defaultdict(list)
    for key, each in kept["train"].items():
        by_label[each.label].append(key)
    if not by_label:
        raise DataError(
            f"each of {counts['train']['found']:,} training texts is held out too, so none is left to learn"
        )
    if len(by_label) < 2:
        raise DataError(
            f"all {len(kept['train']):,} training texts have the label '{next(iter(by_label), '')}'; it takes two to "
            "tell apart"
        )

    def drawn(key: str) -> bytes:
        return hashlib.sha256(f"{seed} {key}".encode()).digest()

    for label in by_label:
        keys = sorted(by_label[label], key=drawn)
        for split, fraction in (("test", test_fraction), ("validation", validation_fraction)):
            if not found.get(split):
                number = min(round(fraction * len(by_label[label])), len(keys) - 1)
                for key in keys[:number]:
                    kept[split][key] = kept["train"].pop(key)
                keys = keys[number:]
    labels = [name for name in order if name in by_label] or sorted(by_label, key=_by_number)
    for split in ("validation", "test"):
        if not found.get(split):
            counts[split]["found"] = len(kept[split])
            counts["train"]["found"] -= len(kept[split])
        strange = Counter(each.label for each in kept[split].values() if each.label not in by_label)
        if strange:
            name, number = strange.most_common(1)[0]
            raise DataError(
                f"{number:,} texts of the {split} split have the label '{name}', which no training text has; the "
                f"labels learnt are {', '.join(labels[:10])}{' …' if len(labels) > 10 else ''}"
            )
    # However the rows stood, the first texts that are watched have labels of all kinds.
    splits = {split: [kept[split][key] for key in sorted(kept[split], key=drawn)] for split in SPLITS}
    return LabelledTexts(splits, labels, {split: counts[split] for split in SPLITS})


def _by_number(label: str) -> tuple[float, str]:
    return (int(label), "") if re.fullmatch(r"[+-]?\d+", label) else (float("inf"), label)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


@dataclass(frozen=True)
class LabelExamples:
    """What is learnt from and tested on; what it has in common with `examples.Examples` has the same names.

    Attributes:
        texts: by split, the texts that are used, as they are before they are cut; those of train and validation are in
            the order of the encoded ones, those of test in that of the records.
        num_shared: test texts that have the same ids as a training text.
    """

    train: list[EncodedText]
    validation: list[EncodedText]
    test: list[dict[str, Any]]
    texts: dict[str, list[LabelledText]]
    counts: dict[str, dict[str, int]]
    frequent_answer: str
    num_shared: int


def label_examples(
    labelled: LabelledTexts, tokenizer: Any, *, sequence_length: int, too_long: TooLong
) -> LabelExamples:
    """Every text as the tokenizer gives it by itself, and a pipeline too; what is too long is cut, dropped or refused.

    Texts that differ may have the same ids, because both are cut or the tokenizer folds case; on two sides they are
    held out alone.

    Raises: DataError if fewer than two labels are left to learn, or a text is too long and that is refused.
    """
    encoded: dict[str, list[EncodedText]] = {}
    texts: dict[str, list[LabelledText]] = {}
    counts: dict[str, dict[str, int]] = {}
    held_out: set[tuple[int, ...]] = set()
    for split in ("test", "validation", "train"):
        found, count = _encode(labelled, split, tokenizer, sequence_length, too_long)
        kept = [(each, ids) for each, ids in found if tuple(ids.input_ids) not in held_out]
        if len(kept) < len(found):
            count["held out too, as it is read"] = len(found) - len(kept)
        held_out |= {tuple(ids.input_ids) for _, ids in kept}
        encoded[split] = [ids for _, ids in kept]
        texts[split] = [each for each, _ in kept]
        counts[split] = {**labelled.counts[split], **count, "used": len(kept)}
    counts = {name: counts.get(name, count) for name, count in labelled.counts.items()}
    names = sorted({each.label for each in texts["train"]})
    if len(names) < 2:
        raise DataError(
            f"{len(texts['train']):,} training texts are left with finetune.sequence_length={sequence_length} and "
            f"finetune.too_long={too_long}, "
            + (f"all with the label '{names[0]}', and it takes two to tell apart; " if names else "")
            + "raise the one, or set the other to truncate"
        )
    test = [
        {
            "id": each.id or hashlib.sha256(each.key.encode()).hexdigest()[:16],
            "prompt": each.text,
            "is_text": True,
            "reference": each.label,
            "end": "",
        }
        for each in texts["test"]
    ]
    trained_on = {tuple(each.input_ids) for each in encoded["train"]}
    return LabelExamples(
        encoded["train"],
        encoded["validation"],
        test,
        texts,
        counts,
        frequent_answer=dataclasses.replace(labelled, splits=texts).frequent_label,
        num_shared=sum(tuple(each.input_ids) in trained_on for each in encoded["test"]),
    )


def _encode(
    labelled: LabelledTexts, split: str, tokenizer: Any, sequence_length: int, too_long: TooLong
) -> tuple[list[tuple[LabelledText, EncodedText]], Counter[str]]:
    numbers = {label: number for number, label in enumerate(labelled.labels)}
    found: list[tuple[LabelledText, EncodedText]] = []
    count: Counter[str] = Counter()
    texts = labelled.splits[split]

    def encode(text: str, **options: Any) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
        return ids

    for start in range(0, len(texts), ENCODED_AT_ONCE):
        some = texts[start : start + ENCODED_AT_ONCE]
        whole = tokenizer([each.text for each in some], verbose=False)["input_ids"]
        for each, ids in zip(some, whole, strict=True):
            if len(ids) > sequence_length:
                if too_long == "refuse":
                    raise DataError(
                        f"a text has {len(ids)} tokens, and finetune.sequence_length is {sequence_length}; set "
                        f"finetune.too_long to truncate or drop (it begins with {each.text[:40]!r})"
                    )
                if labelled.has_holes:
                    piece = fit_around_hole(each.text, lambda text: len(encode(text)) <= sequence_length)
                    each = dataclasses.replace(each, text=piece or "")
                if too_long == "drop" or not each.text:
                    count["dropped, too long"] += 1
                    continue
                ids = encode(each.text, truncation=True, max_length=sequence_length)
                count["truncated"] += 1
            found.append((each, EncodedText(list(ids), numbers[each.label])))
    return found, count


# ---------------------------------------------------------------------------------------------------------------------
# Learning


class ClassifierTrainer(TrainerMixin, Trainer):
    """transformers' trainer with our checkpoints."""


def label_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy over all texts of an optimizer step, however it was cut up; not every type's own loss is."""
    logits = outputs["logits"].float()  # (batch, labels)
    summed = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return summed / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def make_trainer(
    *,
    model: Any,
    args: TrainingArguments,
    train_set: Any,
    validation_set: Any,
    tokenizer: Any,
    callbacks: Sequence[Any],
) -> ClassifierTrainer:
    """The trainer; at each validation it logs the accuracy too."""
    return ClassifierTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=functools.partial(label_loss, smoothing=args.label_smoothing_factor),
        preprocess_logits_for_metrics=_likeliest,
        compute_metrics=_accuracy,
        callbacks=list(callbacks),
    )


def _likeliest(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(evaluated: Any) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions == evaluated.label_ids).mean())}


@torch.no_grad()
def loss_difference(trainer: Any, num_examples: int = 8) -> tuple[float, float]:
    """`(|difference|, loss)` of the trainer's loss on its first texts in one batch and the model's own, text by text.

    The first goes through collator and padding; the second reads each text alone.
    """
    model, dataset = trainer.model, trainer.train_dataset
    rows = [dataset[i] for i in range(min(num_examples, len(dataset)))]
    batch = {name: value.to(model.device) for name, value in trainer.data_collator(rows).items()}
    was_training = model.training
    model.eval()
    try:
        theirs = trainer.compute_loss(model, batch).item()
        summed = 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)  # (1, seq)
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            label = torch.tensor([row["labels"]], device=model.device)
            summed += label_loss(outputs, label, smoothing=trainer.args.label_smoothing_factor).item()
    finally:
        model.train(was_training)
    ours = summed / len(rows)
    return abs(theirs - ours), ours
