"""A whole model from the shards of a training checkpoint, read by the libraries that wrote them.

Under ZeRO these are the optimizer's own fp32 weights, from which training goes on: the model beside them may be rounded
to bf16. DeepSpeed's `zero_to_fp32` puts them together, and torch's distributed checkpoints do so for FSDP.

Both unpickle: give them a checkpoint of which every file is known to be what was written. Not covered: weights that
each process wrote as a file of its own (FSDP's LOCAL_STATE_DICT), tensor or pipeline parallelism, adapters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfscratch.errors import UsageError, missing_extra

if TYPE_CHECKING:
    import torch

DEEPSPEED_SHARDS = "*/*_optim_states.pt"
FSDP_SHARDS = "pytorch_model_fsdp_0/.metadata"
FSDP_WHOLE = "pytorch_model_fsdp.bin"


def is_sharded(checkpoint: Path) -> bool:
    """Whether the weights of a checkpoint lie in files that `from_pretrained` does not open, or there more exactly."""
    has_weights = any(checkpoint.glob("model*.safetensors"))
    return (
        any(checkpoint.glob(DEEPSPEED_SHARDS))
        or (checkpoint / FSDP_SHARDS).is_file()
        or (not has_weights and (checkpoint / FSDP_WHOLE).is_file())
    )


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight of a sharded checkpoint by its name in the model, in main memory; tied ones share theirs.

    Raises: MachineError without DeepSpeed, where it wrote the checkpoint; UsageError if there are no shards.
    """
    if any(checkpoint.glob(DEEPSPEED_SHARDS)):
        return _from_deepspeed(checkpoint)
    if (checkpoint / FSDP_SHARDS).is_file():
        return _from_fsdp((checkpoint / FSDP_SHARDS).parent)
    if (checkpoint / FSDP_WHOLE).is_file():
        import torch

        state: dict[str, torch.Tensor] = torch.load(
            checkpoint / FSDP_WHOLE, map_location="cpu", mmap=True, weights_only=True
        )
        return state
    raise UsageError(f"{checkpoint} holds no weights that are known here: neither safetensors, nor ZeRO's, nor FSDP's")


def _from_deepspeed(checkpoint: Path) -> dict[str, torch.Tensor]:
    if importlib.util.find_spec("deepspeed") is None:
        raise missing_extra("deepspeed", "deepspeed")
    # It tells every step of its work on the terminal.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))
        except (ValueError, FileNotFoundError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"DeepSpeed cannot put the shards of {checkpoint} together: {reason}") from error


def _from_fsdp(folder: Path) -> dict[str, torch.Tensor]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is one process alone, which is what is meant
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}  # accelerate saves {"model": …}


def empty_model(config: Any, *, masked: bool = False) -> Any:
    """The causal (or masked) model of a configuration, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32)


def fill(model: Any, state: Mapping[str, torch.Tensor], *, source: Path) -> None:
    """Gives an empty model its weights, without copying them, and ties those that are one.

    Args:
        source: of the weights, for messages.

    Raises: UsageError if a weight is missing, empty, too many or of another shape.
    """
    try:
        _, extra = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the weights of {source} do not belong to its config.json: {reason}") from None
    model.tie_weights()
    lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta or not tensor.numel()]
    if lacking or extra:
        what = f"lack {_named(lacking)}" if lacking else f"hold {_named(extra)}, which it does not ask for"
        raise UsageError(f"the weights of {source} do not belong to its config.json: they {what}")


def _named(names: Sequence[str]) -> str:
    """The first three of a list of names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
