"""Which of transformers' training arguments a recipe may set, and why not the others. It imports no torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from hfscratch.errors import MachineError, UsageError
from hfscratch.recipe import annotated_fields

HARDWARE = "it is hardware; give it to the launcher: accelerate launch --config_file accelerate_configs/… -m hfscratch"
OURS = "hfscratch sets it itself"
UNKEYED = {"report_to", "run_name", "dataloader_num_workers", "dataloader_pin_memory", "log_level", "logging_steps"}
"""Arguments that do not change the result."""


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
