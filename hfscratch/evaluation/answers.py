"""Questions with known answers, what a model answers to them, and how the answers of several compare.

Answers are greedy, so that they are a fact about the model and not about a seed. A question is put as finetuning puts
it: beginning-of-text, the prompt, and nothing else; an answer ends at the end of text, or where the question says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfscratch.errors import DataError, UsageError
from hfscratch.evaluation import labels, overlap, statistics
from hfscratch.evaluation.statistics import Figure

METRICS = {**overlap.METRICS, **labels.METRICS}
"""By the names of our `evaluate` modules; each gives one figure or several."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding and answers included; affects speed and memory."""


@dataclass(frozen=True)
class Question:
    """A prompt and what is to follow it.

    Attributes:
        prompt: without its beginning-of-text token.
        reference: the right answer.
        end: text that ends an answer; empty if only the end of text does.
        is_text: special tokens that the prompt spells are text. A prompt that a chat template made holds real ones.
        name_as_words: of a function that is to be described: what its name says.
        bag_of_words: of a text that is to be labelled: what its words alone say.
    """

    id: str
    prompt: str
    reference: str
    end: str = ""
    is_text: bool = True
    name_as_words: str | None = None
    bag_of_words: str | None = None


def read_questions(path: Path) -> list[Question]:
    """The questions that finetuning held out. Raises: DataError for a file that holds no such records."""
    questions = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines: a text may hold U+2028
            if not line:
                continue
            record = json.loads(line)
            questions.append(
                Question(
                    id=record["id"],
                    prompt=record["prompt"],
                    reference=record["reference"],
                    end=record["end"],
                    is_text=record["is_text"],
                    name_as_words=record.get("name_as_words"),
                    bag_of_words=record.get("bag_of_words"),
                )
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no questions with `id`, `prompt`, `is_text`, `reference` and `end` "
            f"({type(error).__name__}: {error}); run `hfscratch finetune RECIPE --force`"
        ) from None
    return questions


def choose(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """At most `limit` of them, by the seed, in their own order."""
    if len(questions) <= limit:
        return list(questions)
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def write_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    answer_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: str | None = None,
) -> list[str | None]:
    """The model's likeliest answer to each question; None where the prompt leaves no room for one.

    Args:
        answer_tokens: the most tokens of an answer; fewer where the context is full before.
        batch_tokens: tokens in a batch, padding and answers included; affects speed and memory, not results.
        progress: the label of a progress bar on stderr; no bar if None.
    """
    import torch
    from tqdm.auto import tqdm

    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = [
        [
            *begin,
            *tokenizer(each.prompt, add_special_tokens=False, split_special_tokens=each.is_text, verbose=False)[
                "input_ids"
            ],
        ]
        for each in questions
    ]
    rooms = [answer_tokens if context is None else min(answer_tokens, context - len(row)) for row in rows]
    answers: list[str | None] = [None] * len(questions)
    # What shares a batch has one limit and one end, so that no answer depends on its neighbours.
    order = [i for i, row in enumerate(rows) if row and rooms[i] > 0]
    order.sort(key=lambda i: (rooms[i], questions[i].end, len(rows[i])))
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            tqdm(total=len(order), desc=progress, unit=" answers", disable=progress is None, leave=False) as bar,
        ):
            for batch in _batches(order, rows, rooms, questions, batch_tokens):
                end = questions[batch[0]].end
                written = _generate(model, tokenizer, [rows[i] for i in batch], rooms[batch[0]], end)
                for i, text in zip(batch, written, strict=True):
                    answers[i] = (text.split(end)[0] if end else text).strip()
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return answers


def _batches(
    order: Sequence[int],
    rows: Sequence[Sequence[int]],
    rooms: Sequence[int],
    questions: Sequence[Question],
    batch_tokens: int,
) -> Iterator[list[int]]:
    """Neighbours in `order` of one limit and one end, as many as fit once padded to the longest; at least one."""
    batch: list[int] = []
    for i in order:
        longest = len(rows[i]) + rooms[i]  # they come by length
        is_other = batch and (rooms[i], questions[i].end) != (rooms[batch[0]], questions[batch[0]].end)
        if batch and (is_other or longest * (len(batch) + 1) > batch_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _generate(model: Any, tokenizer: Any, rows: Sequence[list[int]], num_tokens: int, end: str) -> list[str]:
    """Greedy continuations as text, of rows that are padded on the left."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = next((each for each in (tokenizer.pad_token_id, *sorted(ends)) if each is not None), 0)
    longest = max(map(len, rows))
    inputs = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for index, row in enumerate(rows):
        inputs[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1

    def decode(ids: Any) -> list[str]:
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    class Ended(StoppingCriteria):
        # transformers' stop_strings also look at the end of the prompt, which may be the same text.
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            found = [end in text for text in decode(input_ids[:, longest:])]
            return torch.tensor(found, device=input_ids.device)

    output = model.generate(
        inputs.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([Ended()] if end else []),
    )
    return decode(output[:, longest:])


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        records: of each question that all had room for, who answered what.
        summaries: `{who: {figure: {"value", "interval"}}}`.
        comparisons: how far the finetuned model is better than each other, with paired intervals of the difference.
    """

    records: list[dict[str, Any]]
    summaries: dict[str, dict[str, Any]]
    comparisons: list[dict[str, Any]]


def compare(
    written: Mapping[str, Sequence[str | None]],
    questions: Sequence[Question],
    *,
    metrics: Sequence[str],
    most_frequent: str | None,
    seed: int,
) -> Comparison:
    """Scores answers by those of `metrics` that `overlap` has, with cheap ones beside them where they are known.

    Args:
        written: `{who: an answer to each question, or None}`; `finetune` is compared with each other.
        most_frequent: of all answers that were trained on.

    Raises: UsageError if no question has an answer by all.
    """
    kept = [i for i in range(len(questions)) if all(texts[i] is not None for texts in written.values())]
    if not kept:
        raise UsageError(
            f"none of {len(questions)} prompts leaves the model room for an answer; give shorter ones, or a model that "
            "reads more"
        )
    asked = [questions[i] for i in kept]
    given = {who: [str(texts[i]) for i in kept] for who, texts in written.items()}
    if most_frequent is not None:
        given["most_frequent_answer"] = [most_frequent] * len(asked)
    for cheap in ("name_as_words", "bag_of_words"):
        if all(getattr(each, cheap) is not None for each in asked):
            given[cheap] = [str(getattr(each, cheap)) for each in asked]
    scored = {who: _score(texts, asked, metrics) for who, texts in given.items()}
    return Comparison(
        records=[
            {
                "id": each.id,
                "prompt": each.prompt,
                "reference": each.reference,
                "answers": {who: texts[i] for who, texts in given.items()},
            }
            for i, each in enumerate(asked)
        ],
        summaries={
            who: {
                name: {"value": figure.value, "interval": statistics.interval(figure, seed)}
                for name, figure in figures.items()
            }
            for who, figures in scored.items()
        },
        comparisons=_differences(scored, "finetune", seed) if "finetune" in scored else [],
    )


def _score(texts: Sequence[str], questions: Sequence[Question], metrics: Sequence[str]) -> dict[str, Figure]:
    references = [[each.reference] for each in questions]
    found: dict[str, Figure] = {}
    for name in metrics:
        if name in METRICS:
            found |= METRICS[name](texts, references)
    return found


def _differences(scored: Mapping[str, Mapping[str, Figure]], of: str, seed: int) -> list[dict[str, Any]]:
    found = []
    for metric, ours in scored[of].items():
        for over in (each for each in scored if each != of):
            theirs = scored[over][metric]
            found.append(
                {
                    "metric": metric,
                    "of": of,
                    "over": over,
                    "difference": ours.value - theirs.value,
                    "interval": statistics.paired_interval(ours, theirs, seed),
                    "ratio": ours.value / theirs.value if theirs.value else None,
                }
            )
    return found
