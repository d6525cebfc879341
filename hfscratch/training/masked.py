"""What the Trainer needs for models that guess masked tokens.

The loss is summed over the masked tokens and divided by how many there are in the whole step, over all processes and
accumulated batches: the Trainer counts them. So a step is the same however it is divided, also for types whose own loss
is a mean over the batch at hand (BERT's and its kin's).
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from tqdm import tqdm
from transformers import TrainerCallback, masking_utils

from hfscratch.training import attention
from hfscratch.training.callbacks import is_partitioned
from hfscratch.training.examples import IGNORED_LABEL


def trainer_arguments(label_smoothing: float = 0.0) -> dict[str, Any]:
    """What a Trainer is to be given for the loss, and for the accuracy at each validation."""
    return {
        "compute_loss_func": functools.partial(masked_loss, label_smoothing=label_smoothing),
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": _accuracy,
    }


def masked_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, **settings: Any) -> torch.Tensor:
    """Cross-entropy at the masked tokens, in fp32.

    Args:
        labels: (batch, seq), -100 where nothing was masked.
        num_items_in_batch: masked tokens in the step; those of `labels` if None.
    """
    asked = labels != IGNORED_LABEL
    losses = F.cross_entropy(outputs.logits[asked].float(), labels[asked], reduction="sum", **settings)
    return losses / (asked.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _accuracy(found: Any) -> dict[str, float]:
    asked = found.label_ids != IGNORED_LABEL
    return {"masked_accuracy": float((found.predictions == found.label_ids)[asked].mean())}


def document_masks(config: Any, position_ids: torch.Tensor) -> Any:
    """What `attention_mask` must be, so that tokens see both ways in their own document alone: of a model that does not
    tell documents apart by positions that restart, as no masked type of transformers does.

    Args:
        config: of the model, which says what form a mask has.
        position_ids: (batch, seq).

    Returns: a mask, (batch, 1, seq, seq); of a model that has several kinds of layers, one for each.
    """
    packed = masking_utils.packed_sequence_mask_function((position_ids == 0).cumsum(-1))
    embeds = torch.empty(*position_ids.shape, 1, device=position_ids.device)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return masking_utils.create_bidirectional_mask(config, embeds, None, and_mask_function=packed)
    make = {
        "full_attention": masking_utils.create_bidirectional_mask,
        "sliding_attention": masking_utils.create_bidirectional_sliding_window_mask,
    }
    return {kind: make[kind](config, embeds, None, and_mask_function=packed) for kind in sorted(kinds)}


class IsolatingCollator:
    """Gives a batch the masks of its documents.

    Args:
        collate: makes the batch, with `position_ids`.
    """

    def __init__(self, config: Any, collate: Callable[[Any], dict[str, Any]]) -> None:
        self.config, self.collate = copy.copy(config), collate
        if config._attn_implementation == attention.NAME:  # whose masks are sdpa's, and which a spawned worker lacks
            self.config._attn_implementation = "sdpa"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        return batch | {"attention_mask": document_masks(self.config, batch["position_ids"])}


class Fillings(TrainerCallback):
    """What the model puts in the masked places of a text of the validation split, at each validation.

    Args:
        item: a row of it, as the collator takes it.
        show: from input ids, labels and guesses, (seq,) each, to a text.
        num_tokens: tokens that are shown.
    """

    def __init__(
        self, item: dict[str, Any], collate: Callable[[Any], Any], show: Callable[..., str], num_tokens: int
    ) -> None:
        self.item, self.batch, self.show, self.num_tokens = item, collate([item]), show, num_tokens

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or is_partitioned(model):
            return
        inputs = send_to_device(
            {name: each for name, each in self.batch.items() if name not in ("labels", "sources")}, model.device
        )
        was_training = model.training
        model.eval()
        with torch.no_grad():
            guesses = model(**inputs).logits[0].argmax(-1).cpu().numpy()
        model.train(was_training)
        text = self.show(*(row[: self.num_tokens] for row in (self.item["input_ids"], self.item["labels"], guesses)))
        state.log_history.append({"step": state.global_step, "sample": text})
        tqdm.write("    " + " ".join(text.split())[:110], file=sys.stderr)
