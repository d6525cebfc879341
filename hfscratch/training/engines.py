"""What holds the state of training (one process, DDP, DeepSpeed, FSDP), and how to get a whole model out of it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import initialization
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations import is_deepspeed_zero3_enabled

from hfscratch.errors import UsageError


def require_launch(*, whole_models: str | None = None) -> None:
    """Refuses a launch before any work.

    Args:
        whole_models: the stage that asks, if it cannot work on models that are divided among processes.

    Raises: UsageError if the launcher asks for what accelerate would not do, and not say, or for what the stage cannot.
    """
    asks_for_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asks_for_fsdp and not torch.accelerator.is_available():
        raise UsageError(
            "the launcher asks for FSDP, and this machine has no GPU, where accelerate would make it plain DDP; launch "
            "with accelerate_configs/ddp.yaml or zero2.yaml"
        )
    if whole_models is not None and (asks_for_fsdp or _zero_stage() == 3):
        raise UsageError(
            f"{whole_models}: it works on whole models, and the launcher asks for FSDP or ZeRO-3; launch `hfscratch "
            "pretrain` so, and then `hfscratch run` with accelerate_configs/ddp.yaml or zero2.yaml"
        )


def _zero_stage() -> int:
    """What the launcher asks DeepSpeed for; a file of DeepSpeed's own goes before accelerate's key."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        said = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage")
        if said is not None:
            return int(said)
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))


def name_of(arguments: Any) -> str:
    """What holds the state of training: `plain` (one process, or DDP), `zero0` to `zero3`, `fsdp`."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None:
        zero = plugin.hf_ds_config.config.get("zero_optimization", {})
        return f"zero{zero.get('stage', plugin.zero_stage)}"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else "plain"


def clear_padding(model: torch.nn.Module, rank: int) -> None:
    """ZeRO-3 fills up parameters that do not divide over the processes with whatever memory holds. That is never used,
    but saved; zeros make checkpoints of equal runs equal."""
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is not None:
            own = parameter.ds_numel - rank * part.numel()
            part.data.view(-1)[max(0, min(own, part.numel())) :].zero_()


def save_trained_model(trainer: Any, folder: Path) -> None:
    """Writes a `from_pretrained` folder of the whole model, whatever holds its parts. To be called on all processes.

    Under DeepSpeed these are the optimizer's fp32 weights, not the rounded copies that it computes with.
    """
    engine = name_of(trainer.args)
    if engine == "plain":
        trainer.save_model(str(folder))
        return
    if engine == "fsdp":
        state = trainer.accelerator.get_state_dict(trainer.model)
    else:
        state = gather(trainer.accelerator.unwrap_model(trainer.model_wrapped), is_kept=trainer.args.should_save)
    if trainer.args.should_save:
        dtypes = {str(value.dtype) for value in state.values() if value.is_floating_point()}
        for name, same in (getattr(trainer.model, "all_tied_weights_keys", None) or {}).items():
            if same in state:
                state.pop(name, None)
        trainer._save(str(folder), state_dict=state)  # takes them out of `state` as it writes
        if len(dtypes) == 1:
            _name_dtype(folder / "config.json", dtypes.pop().removeprefix("torch."))


@contextlib.contextmanager
def as_its_own_class(model: torch.nn.Module) -> Iterator[None]:
    """FSDP2 gives a model a class of torch's, whose files would be saved as the model's code."""
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


def gather(model: torch.nn.Module, *, is_kept: bool) -> dict[str, torch.Tensor]:
    """The whole state of a model that DeepSpeed trains, one parameter at a time; empty where it is not to be kept. What
    is trained is in fp32, as the optimizer has it. To be called on all processes."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in model.named_parameters():
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:  # it is not trained
            partitioned = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(partitioned):
                whole = parameter.detach().clone()
        if is_kept:
            state[name] = whole.detach().to("cpu")
    if is_kept:
        trained = set(state)
        buffers = {name for name, _ in model.named_buffers()}
        state |= {
            name: value.detach().to("cpu")
            for name, value in model.state_dict().items()
            if name in buffers and name not in trained
        }
    return state


def _name_dtype(path: Path, dtype: str) -> None:
    """The library names the dtype that is computed with; what was written may be another."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype") not in (None, dtype):
        text = json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True)  # as the library writes it
        path.write_text(text + "\n", encoding="utf-8")


def computed_dtype(trainer: Any) -> torch.dtype:
    """In what the trained model computes outside of autocast: FSDP may round whole weights before it uses them."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    return getattr(policy, "param_dtype", None) or next(trainer.model.parameters()).dtype


def leave() -> None:
    """Makes models that are loaded from here on whole ones again: ZeRO-3 would divide them among the processes."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def describe_model(trainer: Any, folder: Path) -> None:
    """Puts what a model folder needs beside its weights into a checkpoint whose weights lie in parts, where the stock
    Trainer writes none of it."""
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with as_its_own_class(model):
        model.config.architectures = [type(model).__name__]
        if getattr(model, "_auto_class", None) is not None:
            custom_object_save(model, str(folder), config=model.config)
    model.config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(str(folder))


def forget(trainer: Any) -> None:
    """Lets `train()` be called once more: what wraps the model is made anew, and the optimizer with it."""
    trainer.model_wrapped = trainer.model
    trainer.optimizer = trainer.lr_scheduler = None


def random_weights(model_class: Any, config: Any) -> Any:
    """A new model in fp32. Its weights follow from the seed alone, also where ZeRO-3 divides it while it is made."""
    if is_deepspeed_zero3_enabled():  # draws values once all modules are made
        return model_class.from_config(config, dtype=torch.float32)
    with initialization.no_init_weights():
        model = model_class.from_config(config, dtype=torch.float32)
    model.init_weights()
    return model


def num_partitioned(model: Any) -> int:
    """Parameters of a model that ZeRO-3 has partitioned; 0 for any other."""
    return sum(getattr(parameter, "ds_numel", 0) for parameter in model.parameters())
