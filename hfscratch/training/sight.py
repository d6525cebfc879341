"""Which tokens of a row a model sees: none that it is to predict, both sides of what is masked, no other document."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import torch

from hfscratch.artifact import Proof
from hfscratch.errors import UsageError
from hfscratch.training.masked import document_masks

LEAST_SIGHT = 1e-5
"""Of the largest logit, what the tokens on one side of a masked model must move those on the other by."""
PROBED_WIDTHS = 4096
"""Models of up to this width times depth are tried with their weights before any stage works; larger ones without."""
PROBED_TOKENS = 256
"""Tokens of the row that such a trial reads, at most."""


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits of one row, (1, seq, vocab), in fp32 and on the CPU."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=input_ids).logits.float().cpu()  # (1, seq, vocab)


def reach(model: Any, input_ids: torch.Tensor) -> tuple[float, float]:
    """How far the logits of a row's first half move when its second half changes, 0 for a causal model; and those of
    the second when the first does."""
    half = input_ids.shape[1] // 2
    before, moved = logits_of(model, input_ids), []
    for seen, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        changed = input_ids.clone()
        changed[:, other] = (changed[:, other] + 1) % model.config.vocab_size
        moved.append((logits_of(model, changed)[:, seen] - before[:, seen]).abs().max().item())
    return moved[0], moved[1]


def leak(model: Any, input_ids: torch.Tensor, **settings: Any) -> float:
    """How far the logits of a row's second document move when its first, of half the row, changes."""
    half = input_ids.shape[1] // 2
    other = input_ids.clone()
    other[:, :half] = (other[:, :half] + 1) % model.config.vocab_size
    with torch.no_grad():
        one, two = (model(input_ids=each, **settings).logits for each in (input_ids, other))
    return float((one - two)[:, half:].abs().max())


def sight_proof(moved: tuple[float, float], logits: torch.Tensor, *, masked: bool) -> Proof:
    """That a causal model sees no later token, or a masked one those on both sides."""
    ahead, behind = moved
    largest = max(1.0, logits.abs().max().item())
    if masked:
        return Proof(
            "tokens see those before and those after them",
            min(moved) > LEAST_SIGHT * logits.abs().max().item(),
            f"changing the second half of a row moves the logits of the first by up to {ahead:.1e}, and the first half "
            f"those of the second by {behind:.1e}",
        )
    return Proof(
        "no token sees those after it",
        ahead <= 1e-4 * largest,
        f"changing the second half of a row moves the logits of the first by {ahead:.1e} at most",
    )


def reload_proof(model_class: Any, folder: Path, input_ids: Any, reference: Any, model: Any, dtype: Any) -> Proof:
    """That a model folder opens to the logits (1, seq, vocab) of the model that was written."""
    reloaded = model_class.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
    reloaded.to(model.device)
    difference = (logits_of(reloaded, input_ids.to(model.device)) - reference).abs().max().item()
    return Proof(
        "the published folder reloads to the trained model's logits",
        difference <= 1e-4 * max(1.0, reference.abs().max().item()),
        f"max |Δlogit| {difference:.1e} over {input_ids.shape[1]} tokens",
    )


def require_usable(
    model_class: Any, config: Any, *, sequence_length: int, longest: int, isolate_documents: bool, masked: bool
) -> None:
    """Builds the model that a recipe's `pretrain` is to train and lets it read a row, before any stage works; a large
    one without its weights.

    Args:
        sequence_length, longest: tokens of the rows that it begins with, and of the longest.
        isolate_documents: whether a token is to see only its own document.
        masked: whether it is to see both ways.

    Raises: UsageError if that fails, if a causal one sees tokens before it predicts them, a masked one only those on
    one side, or if documents that are to be isolated see each other.
    """
    kind = config.model_type
    most = getattr(config, "max_position_embeddings", None) or longest
    if most < longest and longest > sequence_length:
        raise UsageError(
            f"a phase of pretrain.phases has rows of {longest} tokens (sequence_length), and the model reads at most "
            f"{most} (max_position_embeddings); shorten them, or set model.max_position_embeddings={longest}"
        )
    if most < longest:
        raise UsageError(
            f"pretrain.sequence_length is {longest}, and the model reads at most {most} tokens "
            f"(max_position_embeddings); shorten the rows, or set model.max_position_embeddings={longest}"
        )
    length = min(sequence_length, PROBED_TOKENS)
    is_small = config.hidden_size * config.num_hidden_layers <= PROBED_WIDTHS
    ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
    try:
        with torch.device("cpu" if is_small else "meta"):
            model = model_class.from_config(copy.deepcopy(config)).eval()
        if not is_small:
            ids = ids.to("meta")
            # A mask that is ready keeps transformers from looking at values, which there are none of.
            mask = torch.zeros(1, 1, length, length, device="meta")
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
            return
        ahead, behind = reach(model, ids)
        largest = logits_of(model, ids).abs().max().item()
        leaked = 0.0
        if isolate_documents and masked and kind != "scratch":
            leaked = math.inf
            with contextlib.suppress(Exception):  # whatever a type raises that takes no such mask
                masks = {"attention_mask": document_masks(model.config, positions)}
                leaked = leak(model, ids, position_ids=positions, **masks)
        elif isolate_documents:
            leaked = leak(model, ids, position_ids=positions, use_cache=False)
        shifted = 0.0
        if isolate_documents:  # documents are told apart by positions that begin with 0
            with torch.no_grad():
                counted = model(input_ids=ids, position_ids=torch.arange(length)[None]).logits.float()
            shifted = (counted - logits_of(model, ids)).abs().max().item()
    except Exception as error:  # whatever foreign modeling code raises on values that do not fit it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"model.type is '{kind}', which cannot be built and read a row of {length} tokens: {reason}"
        ) from error
    if masked and not min(ahead, behind) > LEAST_SIGHT * largest:
        raise UsageError(f"model.type is '{kind}', which does not see the tokens on both sides; take a masked type")
    if not masked and not ahead <= 1e-4:
        raise UsageError(f"model.type is '{kind}', which sees the tokens that it is to predict; take a causal type")
    if not shifted <= 1e-3 * max(1.0, largest):
        raise UsageError(
            f"model.type is '{kind}', which counts positions in its own way, and not from 0; set "
            "pretrain.isolate_documents=false, or take another type"
        )
    if not leaked <= 1e-4:
        raise UsageError(
            f"model.type is '{kind}', whose documents see each other when they share a row; set "
            "pretrain.isolate_documents=false, or take another type"
        )
