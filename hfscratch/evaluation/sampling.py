"""Text that a causal model writes, in seeded batches.

Streaming to a terminal is `hfscratch.serving`'s; here many samples are drawn at once and looked at afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hfscratch.evaluation.likelihood import begin_token_id, encode

# What one call of `generate` draws together. It is fixed, because the draws of a batch share one random stream: another
# size would give other samples.
BATCH_SIZE = 50
PROMPT_TOKENS = 16
"""Tokens of a held-out document that a sample continues, where no prompt is given: half the context at most."""


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_at_end: bool = True,
    progress: str | None = None,
) -> list[list[int]]:
    """Continues each prompt by `num_tokens` token ids, or by fewer if the model ends the text.

    Args:
        prompts: token ids, all of one length; the beginning-of-text token is put before them.
        temperature: 0 takes the likeliest token every time.
        stop_at_end: False forbids every special token, so that all continuations have exactly `num_tokens`.
        progress: the label of a progress bar on stderr; no bar if None.
    """
    import torch
    from tqdm.auto import tqdm

    special = sorted(set(tokenizer.all_special_ids))
    choice: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    if not stop_at_end:
        choice["suppress_tokens"] = special
    begin = begin_token_id(tokenizer)
    end = tokenizer.eos_token_id
    pad = next(token for token in (tokenizer.pad_token_id, end, begin) if token is not None)
    devices = [model.device] if model.device.type == "cuda" else []
    continuations: list[list[int]] = []
    was_training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            tqdm(total=len(prompts), desc=progress, unit=" samples", disable=progress is None, leave=False) as bar,
        ):
            torch.manual_seed(seed)
            for first in range(0, len(prompts), BATCH_SIZE):
                rows = [[begin, *prompt] for prompt in prompts[first : first + BATCH_SIZE]]
                inputs = torch.tensor(rows, device=model.device)  # (batch, prompt)
                output = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=num_tokens,
                    eos_token_id=end,
                    pad_token_id=pad,
                    **choice,
                )
                for row in output[:, inputs.shape[1] :].tolist():
                    ended = row.index(end) if end in row else len(row)
                    continuations.append(row[:ended])
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return continuations


def continue_texts(
    model: Any,
    tokenizer: Any,
    held_out: Sequence[str],
    *,
    num_samples: int,
    num_tokens: int,
    prompt: Sequence[int] | None,
    context: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[dict[str, Any]]:
    """`[{"prompt", "text", "num_tokens"}]`: what the model writes after a prompt, or after held-out beginnings.

    Args:
        prompt: token ids that each sample continues; if None, the first begins afresh and the others continue the
            first words of seeded texts of `held_out`.
        context: the most tokens that the model reads, or None.
    """
    if num_samples == 0:
        return []
    prompts: list[list[int]]
    if prompt is not None:
        prompts = [list(prompt)] * num_samples
    else:
        # They may end inside a character; what is shown as the prompt is decoded from the same tokens.
        given = PROMPT_TOKENS if context is None else min(PROMPT_TOKENS, (context - 1) // 2)
        beginnings = [row[:given] for row in encode(tokenizer, held_out) if len(row) > given]
        chosen = random.Random(seed).sample(beginnings, min(num_samples - 1, len(beginnings)))
        prompts = [[]] * (num_samples - len(chosen)) + chosen
    samples: list[dict[str, Any]] = []
    for length in sorted(set(map(len, prompts))):
        alike = [each for each in prompts if len(each) == length]
        room = num_tokens if context is None else min(num_tokens, context - 1 - length)
        continuations = sample(
            model, tokenizer, alike, num_tokens=room, temperature=temperature, top_p=top_p, seed=seed
        )
        for each, row in zip(alike, continuations, strict=True):
            before = tokenizer.decode(each, clean_up_tokenization_spaces=False)
            whole = tokenizer.decode([*each, *row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A character may begin in the prompt and end in the text; then the prompt is shown without its half.
            before = before if whole.startswith(before) else before.rstrip("\ufffd")
            samples.append({"prompt": before, "text": whole[len(before) :], "num_tokens": len(row)})
    return samples
