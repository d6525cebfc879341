"""Which of transformers' training arguments a recipe may set, why not the others, and what pretraining makes of them.

To be imported it needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hfscratch.errors import MachineError, UsageError
from hfscratch.recipe import annotated_fields

HARDWARE = "it is hardware; give it to the launcher: accelerate launch --config_file accelerate_configs/… -m hfscratch"
OURS = "hfscratch sets it itself"
MUON = "muon"
"""The optimizer that `optim` may name beside those that transformers knows."""
UNKEYED = {
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("dataloader_num_workers", "dataloader_pin_memory", "log_level", "logging_steps"),
}
"""Arguments that do not change the result."""
NUM_EVALUATIONS = 8
"""Of a pretraining, if its recipe does not say how many."""


@functools.cache
def argument_names() -> Mapping[str, str]:
    """`{field: annotation}` of `TrainingArguments`."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    return annotated_fields(Path(spec.origin).parent / "training_args.py", "TrainingArguments")


def refused(batch_key: str) -> dict[str, str]:
    """`{argument: reason}` of what no recipe sets; `batch_key` is the key that says what the global batch is."""
    batch = f"it is hardware; the global batch is {batch_key}, the rest is derived"
    return {
        **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "local_rank", "use_cpu"), HARDWARE),
        **dict.fromkeys(
            ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), f"{HARDWARE}; precision follows the machine"
        ),
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"), batch),
        "per_device_eval_batch_size": "it is hardware; it is derived",
        "output_dir": f"{OURS}; the recipe's `out` says where everything goes",
        "seed": f"{OURS}; the recipe's own `seed` is used",
        "data_seed": f"{OURS}; the recipe's own `seed` is used",
        "resume_from_checkpoint": "an interrupted run goes on by itself",
        "do_eval": f"{OURS}; switch validation off with eval_strategy: no",
        **dict.fromkeys(
            ("save_only_model", "ignore_data_skip", "save_on_each_node", "enable_jit_checkpoint"),
            "a run that is interrupted could not go on with the same bits",
        ),
        "train_sampling_strategy": "the order of rows is a deterministic index",
        "use_cache": "with a cache, documents that share a row would see each other",
        **dict.fromkeys(
            (
                "do_train",
                "do_predict",
                "remove_unused_columns",
                "label_names",
                "metric_for_best_model",
                "greater_is_better",
                "prediction_loss_only",
                "restore_callback_states_from_checkpoint",
                "disable_tqdm",
            ),
            OURS,
        ),
        "push_to_hub": "only `push` ever sends anything anywhere",
    }


@contextlib.contextmanager
def as_usage_errors(section: str) -> Iterator[None]:
    """What a trainer raises on arguments that it cannot honour, as ours."""
    try:
        yield
    except ImportError as error:
        raise MachineError(f"{section}: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UsageError(f"{section}: {' '.join(str(error).split())}") from error


def pretrain_arguments(
    given: Mapping[str, Any],
    folder: Path,
    seed: int,
    *,
    max_steps: int,
    has_validation: bool,
    is_continued: bool,
    tells_predictions: bool,
    learning_rate: float | None = None,
    precision: str | None = None,
    eval_rows: int = 1,
    accumulation: int = 1,
    compile_model: bool = False,
) -> Any:
    """The `TrainingArguments` of pretraining: what the recipe gives, our defaults, and what is ours.

    Args:
        given: by the recipe.
        folder: of checkpoints.
        is_continued: whether the run starts from a checkpoint that somebody else made.
        tells_predictions: whether validation needs them, beside the loss.
        precision: fp32, bf16 or fp16; None while it is not chosen.
        eval_rows: rows at a time in validation.

    Raises: UsageError for what cannot be together.
    """
    import torch
    from transformers import TrainingArguments

    every = max(1, math.ceil(max_steps / NUM_EVALUATIONS))
    values: dict[str, Any] = {
        "max_steps": max_steps,
        "weight_decay": 0.0,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-10,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "logging_steps": max(1, min(20, max_steps // 50)),
        "eval_strategy": "steps" if has_validation else "no",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "report_to": "none",
    }
    values |= {name: value for name, value in given.items() if name != "num_train_epochs"}
    if not has_validation:
        values["eval_strategy"] = "no"
    values["max_steps"] = max_steps
    is_validated = values["eval_strategy"] != "no"
    if is_continued:
        values.setdefault("eval_on_start", is_validated)
    # The best checkpoint can be published only if validations and checkpoints fall together: one follows the other.
    for kind in ("steps", "strategy"):
        for name, other in ((f"eval_{kind}", f"save_{kind}"), (f"save_{kind}", f"eval_{kind}")):
            if name in given and other not in given and is_validated and given[name] not in ("no", "best"):
                values[other] = given[name]
    together = values["save_strategy"] == "best" or (
        values["save_strategy"] == values["eval_strategy"]
        and (values["save_strategy"] != "steps" or values["save_steps"] == values["eval_steps"])
    )
    values.setdefault("load_best_model_at_end", is_validated and values["save_strategy"] != "no")
    if values["load_best_model_at_end"] and not together:
        raise UsageError(
            f"pretrain: validation is every {values['eval_steps']} {values['eval_strategy']} and checkpoints every "
            f"{values['save_steps']} {values['save_strategy']}; make them equal, or set load_best_model_at_end: false"
        )
    values |= {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "per_device_train_batch_size": 1,  # an item of `Batches`
        "per_device_eval_batch_size": eval_rows,
        "gradient_accumulation_steps": accumulation,
        "torch_compile": compile_model,
        "train_sampling_strategy": "sequential",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": not tells_predictions,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
    }
    if learning_rate is not None:
        values["learning_rate"] = learning_rate
    if values.get("optim") == MUON:  # which transformers does not know; the trainer puts it in AdamW's place
        values["optim"] = "adamw_torch_fused"
    with as_usage_errors("pretrain"):
        return TrainingArguments(**values)
