"""Lets an `evaluate` module take its model as an object, a folder or a name on the Hub, which is loaded once.

No code of a folder runs, weights are read from safetensors only, and a folder whose weights do not fill its config is
refused. Folders that a user types on the command line are `hfscratch.serving`'s, which says more of what is wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hfscratch.errors import MachineError, UsageError
from hfscratch.evaluation.likelihood import future_leak

HUB_TIMEOUT_S = 10


def resolve(model: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model and tokenizer objects, loaded where a folder or a name is given.

    Args:
        model: a causal model, the folder of one, or its name on the Hub.
        tokenizer: a tokenizer, the folder or name of one, or None for the one beside the model.

    Raises: UsageError if `model` is an object and `tokenizer` is missing, a folder holds no usable model, or the model
    is not causal; MachineError if the Hub cannot be reached or a library is missing.
    """
    if tokenizer is None:
        if not isinstance(model, (str, Path)):
            raise UsageError("a model given as an object needs its tokenizer: pass tokenizer=")
        tokenizer = model
    if isinstance(model, (str, Path)):
        model = _model(str(model), _stamp(model))
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _tokenizer(str(tokenizer), _stamp(tokenizer))
    leak = future_leak(model)
    if not leak.is_causal:
        raise UsageError(
            f"a {type(model).__name__} as it is configured here sees the tokens it is to predict (its logits move by "
            f"{leak.largest_change:.1e} when later tokens change), so likelihoods mean nothing; give a causal model"
        )
    return model, tokenizer


def _stamp(folder: str | Path) -> int:
    """When a folder's files last changed, so that a retrained model is loaded anew; 0 for a name on the Hub."""
    return max((path.stat().st_mtime_ns for path in Path(folder).glob("*") if path.is_file()), default=0)


@functools.lru_cache(maxsize=1)
def _model(name: str, stamp: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = _load(
        AutoModelForCausalLM,
        name,
        "causal model",
        use_safetensors=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # so that it is we who say so, below
        output_loading_info=True,
    )
    model, loading = loaded
    unfilled = sorted(map(str, (*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"]))))
    if unfilled:
        raise UsageError(
            f"the weights of {name} lack {len(unfilled)} of the tensors that its config.json asks for, or have them in "
            f"another shape ({unfilled[0]}); the two do not belong together"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str, stamp: int) -> Any:
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, "tokenizer")


def _load(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    local_files_only = Path(name).is_dir() or not _hub_has(name)
    try:
        # False, and not left out: left out, transformers asks on the terminal whether to run the code.
        return auto_class.from_pretrained(name, trust_remote_code=False, local_files_only=local_files_only, **options)
    except ImportError as error:
        raise MachineError(f"{name} needs a library that is missing: {_first_line(error)}") from error
    except Exception as error:  # whatever the libraries raise at a damaged folder; the tokenizers' is a plain Exception
        if "trust_remote_code=True" in str(error):
            raise UsageError(
                f"{name} needs its own Python code to run, which the metric does not; load it yourself if you trust "
                "that code, and give the metric the objects: model=, tokenizer="
            ) from error
        raise UsageError(f"no {what} could be loaded from {name}: {_first_line(error)}") from error


def _hub_has(name: str) -> bool:
    """True if the Hub has the model, False if the Hub is out of reach but the model is in the local cache.

    Asked once and without retries, because loading would try six times over half a minute.

    Raises: UsageError if the Hub does not have it (or not for us); MachineError if nobody can say.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.model_info(name, timeout=HUB_TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError):  # the latter covers gated models
        raise UsageError(f"there is no model folder {name} and no model of that name on the Hub for you") from None
    except Exception as error:  # whatever the network layer raises
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return False
        raise MachineError(f"there is no model folder {name}, and the Hub cannot be reached to look there") from error
    return True


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
