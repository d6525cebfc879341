"""Examples to learn answers from: encoded, with the loss on the answers alone, and every one accounted for.

A prompt is encoded as it will be given later: alone. What is too long is cut, left out or refused, and counted.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfscratch.errors import DataError, UsageError
from hfscratch.training import conversations, docstrings

IGNORED_LABEL = -100
TooLong = Literal["truncate", "drop", "refuse"]


@dataclass(frozen=True)
class Encoded:
    """One example: its ids, and the same as labels with -100 wherever nothing is to be learnt."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that carry loss; the first of a row is predicted by nothing."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


@dataclass(frozen=True)
class Examples:
    """What is learnt from and tested on.

    Attributes:
        train: encoded examples.
        validation: encoded examples.
        test: records for `evaluate`: a prompt (without its beginning-of-text token), the reference, and what ends an
            answer.
        counts: by split, what was found, cut and left out.
        frequent_answer: the most frequent training answer.
        sample_prompt: what is answered at each validation, for the eye.
        num_shared: test examples that are among the training examples too.
    """

    train: list[Encoded]
    validation: list[Encoded]
    test: list[dict[str, Any]]
    counts: dict[str, dict[str, int]]
    frequent_answer: str
    sample_prompt: str
    num_shared: int


# ---------------------------------------------------------------------------------------------------------------------
# Functions and their docstrings


def docstring_examples(
    documents: Mapping[str, Iterable[tuple[str, str]]],
    tokenizer: Any,
    *,
    whole: bool,
    sequence_length: int,
    answer_tokens: int,
    too_long: TooLong,
) -> Examples:
    """Functions of each split; a training function that is held out too, or repeated, is not learnt from.

    Args:
        documents: `(id, text)` of the splits train, validation and test.
        whole: learn whole docstrings, not their first paragraphs.
        answer_tokens: tokens that are kept free for the answer.

    Raises: DataError if nothing is left; UsageError if no room is left for the function.
    """
    room = sequence_length - answer_tokens - 2  # for the prompt; beginning and end of text take one each
    if room < answer_tokens:
        raise UsageError(
            f"finetune.answer_tokens is {answer_tokens}, which leaves {max(room, 0)} of {sequence_length} tokens for "
            f"the function; set it to {max(1, sequence_length // 4)} or less"
        )
    pairs = {
        split: [
            (f"{identifier}:{pair.name}", pair)
            for identifier, text in documents[split]
            for pair in docstrings.docstring_pairs(text, whole=whole)
        ]
        for split in ("train", "validation", "test")
    }
    if not pairs["train"]:
        raise DataError(
            "the train split has no Python function with a docstring; take data of Python code, or finetune.task=sft"
        )
    held_out = {_squeeze(pair.source) for split in ("validation", "test") for _, pair in pairs[split]}
    encoded: dict[str, list[Encoded]] = {"train": [], "validation": []}
    counts: dict[str, dict[str, int]] = {}
    learnt_from: set[str] = set()
    answers: collections.Counter[str] = collections.Counter()
    for split, examples in encoded.items():
        count: collections.Counter[str] = collections.Counter(found=len(pairs[split]))
        seen: set[str] = set()
        for name, pair in pairs[split]:
            key = _squeeze(pair.source)
            if key in seen or (split == "train" and key in held_out):
                count["repeated" if key in seen else "held out too"] += 1
                continue
            seen.add(key)
            prompt, was_cut = _docstring_prompt(tokenizer, pair, room)
            example = encode_text(tokenizer, prompt or "", pair.answer)
            answer_is_long = example.num_answer_tokens > answer_tokens + 1
            if too_long == "refuse" and (was_cut or answer_is_long):
                raise DataError(
                    f"the function {name} is longer than {sequence_length} tokens, {answer_tokens} of them for its "
                    "docstring; set finetune.too_long to truncate or drop"
                )
            if prompt is None or answer_is_long or (was_cut and too_long == "drop"):
                count["dropped, too long"] += 1
                continue
            count["truncated"] += was_cut
            examples.append(example)
            if split == "train":
                learnt_from.add(key)
                answers[pair.docstring] += 1
        counts[split] = {**count, "used": len(examples)}
    if not encoded["train"]:
        raise DataError(
            f"none of {len(pairs['train']):,} functions fits into finetune.sequence_length={sequence_length} with "
            f"{answer_tokens} tokens for the answer"
        )
    test = []
    tested: collections.Counter[str] = collections.Counter(found=len(pairs["test"]))
    num_shared = 0
    for name, pair in pairs["test"]:
        prompt, was_cut = _docstring_prompt(tokenizer, pair, room)
        num_shared += _squeeze(pair.source) in learnt_from
        if prompt is None:
            tested["dropped, too long"] += 1
            continue
        tested["truncated"] += was_cut
        test.append(
            {
                "id": name,
                "prompt": prompt,
                "is_text": True,
                "reference": pair.docstring,
                "end": docstrings.QUOTES,
                "name_as_words": pair.name_as_words,
            }
        )
    counts["test"] = {**tested, "used": len(test)}
    shown = (pairs["validation"] or pairs["train"])[0][1]
    return Examples(
        train=encoded["train"],
        validation=encoded["validation"],
        test=test,
        counts=counts,
        frequent_answer=answers.most_common(1)[0][0],
        sample_prompt=_docstring_prompt(tokenizer, shown, room)[0] or shown.prompt(""),
        num_shared=num_shared,
    )


def _docstring_prompt(tokenizer: Any, pair: docstrings.DocstringPair, room: int) -> tuple[str | None, bool]:
    """The prompt, and whether the function was cut for it; None if its signature alone is too long."""
    fixed = len(text_ids(tokenizer, pair.prompt("")))
    if fixed >= room:
        return None, True
    # The joint between the two pieces may cost a token more than both have alone.
    source = fit_lines(tokenizer, pair.source, room - fixed - 1)
    return pair.prompt(source), source != pair.source


def _squeeze(source: str) -> str:
    """A function as a key that white space does not change."""
    return " ".join(source.split())


# ---------------------------------------------------------------------------------------------------------------------
# Instructions and their answers


def instruction_examples(
    found: Sequence[conversations.Example],
    tokenizer: Any,
    *,
    validation_fraction: float,
    test_fraction: float,
    sequence_length: int,
    too_long: TooLong,
) -> Examples:
    """Instruction data, split by the hash of the question, so that one question always falls on the same side.

    Raises: DataError if nothing is left, or an example is too long and that is refused.
    """
    splits: dict[str, list[conversations.Example]] = {"train": [], "validation": [], "test": []}
    for example in found:
        share = int(example.question[:8], 16) / 2**32
        held_out = "test" if share < test_fraction else "validation"
        splits[held_out if share < test_fraction + validation_fraction else "train"].append(example)
    encoded: dict[str, list[Encoded]] = {"train": [], "validation": []}
    counts: dict[str, dict[str, int]] = {}
    answers: collections.Counter[str] = collections.Counter()
    for split, examples in encoded.items():
        count: collections.Counter[str] = collections.Counter(found=len(splits[split]))
        for example in splits[split]:
            whole = (
                encode_chat(tokenizer, example.messages)
                if example.messages
                else encode_text(tokenizer, example.prompt, example.completion)
            )
            kept = Encoded(whole.input_ids[:sequence_length], whole.labels[:sequence_length])
            is_long = len(whole.input_ids) > sequence_length
            if is_long and too_long == "refuse":
                raise DataError(
                    f"an example has {len(whole.input_ids)} tokens, and finetune.sequence_length is {sequence_length}; "
                    "set finetune.too_long to truncate or drop"
                )
            if (is_long and too_long == "drop") or kept.num_answer_tokens == 0:
                count["dropped, too long" if is_long else "dropped, nothing to learn"] += 1
                continue
            count["truncated"] += is_long
            examples.append(kept)
            if split == "train":
                answers[example.answer] += 1
        counts[split] = {**count, "used": len(examples)}
    if not encoded["train"]:
        raise DataError(
            f"finetune.data: none of {len(splits['train']):,} training examples fits into {sequence_length} tokens "
            "with anything of its answer; raise finetune.sequence_length, or take shorter ones"
        )
    test = [
        {
            "id": example.question[:16],
            "prompt": prompt,
            "is_text": not example.messages,  # else it went through the chat template, whose special tokens are meant
            "reference": example.answer,
            "end": "",
        }
        for example in splits["test"]
        if len(text_ids(tokenizer, prompt := prompt_text(tokenizer, example))) + 2 <= sequence_length
    ]
    num_long = len(splits["test"]) - len(test)
    counts["test"] = {"found": len(splits["test"]), "dropped, too long": num_long, "used": len(test)}
    trained_on = {example.question for example in splits["train"]}
    shown = next(iter(splits["validation"] or splits["train"]))
    return Examples(
        train=encoded["train"],
        validation=encoded["validation"],
        test=test,
        counts=counts,
        frequent_answer=answers.most_common(1)[0][0],
        sample_prompt=prompt_text(tokenizer, shown),
        num_shared=sum(example.question in trained_on for example in splits["test"]),
    )


def prompt_text(tokenizer: Any, example: conversations.Example) -> str:
    """What the last answer of an example continues, without the beginning-of-text token, which its reader puts
    before it."""
    if not example.messages:
        return example.prompt
    messages = [dict(message) for message in example.messages[:-1]]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "")


# ---------------------------------------------------------------------------------------------------------------------
# Token ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in which special tokens, spelt out, are text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def encode_text(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """Beginning-of-text, prompt, answer and end-of-text, with the loss on the last two.

    The ids of the prompt are those it has alone, as it will be given later, also where the whole text would be cut
    into tokens across its end.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before, whole = text_ids(tokenizer, prompt), text_ids(tokenizer, prompt + answer)
    after = whole[len(before) :] if whole[: len(before)] == before else text_ids(tokenizer, answer)
    after = [*after, tokenizer.eos_token_id]
    return Encoded([*begin, *before, *after], [IGNORED_LABEL] * (len(begin) + len(before)) + after)


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    """A conversation through the tokenizer's chat template, with the loss on what its generation markers enclose.

    Raises: DataError if the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses a conversation of {roles}: {error}") from None
    ids = rendered["input_ids"]
    labels = [
        token if learnt else IGNORED_LABEL for token, learnt in zip(ids, rendered["assistant_masks"], strict=True)
    ]
    return Encoded(ids, labels)


def require_trainable_template(tokenizer: Any, where: str) -> None:
    """Raises: UsageError if the chat template has no generation markers, or leaves the token that ends an answer out
    of them, so that the model would never learn to stop."""
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    if not has_generation_markers(tokenizer.chat_template):
        raise UsageError(
            f"the chat template of {where} has no {{% generation %}} markers around the assistant's turn, so it does "
            "not say what is to be learnt; give one that has them as finetune.chat_template"
        )
    if not is_chat_template_stop_token_trained(tokenizer):
        raise UsageError(
            f"the chat template of {where} closes {{% endgeneration %}} before the token that ends an answer, so the "
            "model would never learn to stop; give another as finetune.chat_template"
        )


def fit_lines(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The first lines of `text` that have at most `max_tokens` tokens; all of them if they fit."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    if len(encoded["input_ids"]) <= max_tokens:
        return text
    end = encoded["offset_mapping"][max_tokens][0]  # the first character that does not fit
    return text[: max(0, text.rfind("\n", 0, end))]


def training_order(lengths: Sequence[int], *, batch_size: int, num_steps: int, seed: int) -> list[int]:
    """Which example stands where in `num_steps` batches: epochs in a seeded order, batches of like length.

    It depends on its arguments alone, so going on from a step is an offset. Examples are shuffled, sorted by length
    within every 50 batches (little padding), and the batches shuffled again.
    """
    import numpy as np

    sizes, order = np.asarray(lengths), np.empty(0, dtype=np.int64)
    epoch = 0
    while len(order) < num_steps * batch_size:
        generator = np.random.default_rng([seed, epoch])
        shuffled = generator.permutation(len(sizes))
        pools = np.split(shuffled, range(50 * batch_size, len(sizes), 50 * batch_size))
        near = np.concatenate([pool[np.argsort(sizes[pool], kind="stable")] for pool in pools])
        batches = np.split(near, range(batch_size, len(near), batch_size))
        order = np.concatenate([order, *(batches[i] for i in generator.permutation(len(batches)))])
        epoch += 1
    return order[: num_steps * batch_size].tolist()


def bytes_per_answer_token(tokenizer: Any, examples: Sequence[Encoded]) -> float:
    """Bytes of the answers for each of their tokens, from a sample; turns loss into bits a byte."""
    answers = [[label for label in each.labels if label != IGNORED_LABEL] for each in examples[:1000]]
    num_bytes = sum(len(tokenizer.decode(each, skip_special_tokens=True).encode()) for each in answers)
    return max(1, num_bytes) / max(1, sum(map(len, answers)))
