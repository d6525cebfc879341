"""Lets an `evaluate` module take its model as an object or as a folder, which is loaded once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hfscratch.errors import UsageError


def resolve(model: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model and tokenizer objects, loaded from their folders where paths are given.

    Args:
        model: a causal model, or the folder of one.
        tokenizer: a tokenizer, the folder of one, or None for the one in the model's folder.

    Raises: UsageError if `model` is an object and `tokenizer` is missing, or a folder holds no model.
    """
    if tokenizer is None:
        if not isinstance(model, (str, Path)):
            raise UsageError("a model given as an object needs its tokenizer: pass tokenizer=")
        tokenizer = model
    if isinstance(model, (str, Path)):
        model = _model(str(model), _stamp(model))
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _tokenizer(str(tokenizer), _stamp(tokenizer))
    return model, tokenizer


def _stamp(folder: str | Path) -> int:
    """When a folder's files last changed, so that a retrained model is loaded anew; 0 for a name on the Hub."""
    return max((path.stat().st_mtime_ns for path in Path(folder).glob("*") if path.is_file()), default=0)


@functools.lru_cache(maxsize=1)
def _model(folder: str, stamp: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"no causal model could be loaded from {folder}: {str(error).splitlines()[0]}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str, stamp: int) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer could be loaded from {folder}: {str(error).splitlines()[0]}") from error
