"""Text that a causal model writes, in seeded batches.

Streaming to a terminal is `hfscratch.serving`'s; here many samples are drawn at once and looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfscratch.evaluation.likelihood import begin_token_id

# What one call of `generate` draws together. It is fixed, because the draws of a batch share one random stream: another
# size would give other samples.
BATCH_SIZE = 50


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
