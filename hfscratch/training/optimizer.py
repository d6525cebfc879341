"""AdamW with a learning rate per role: the setting that was measured to matter most (docs/log.md).

A parameter's role is found by structure, not by name, so stock architectures get the same treatment:
`embedding` (the table that token ids are looked up in), `head` (the output matrix, also where it is the embedding too:
what is read out of must move slowly), `matrix` (every other weight of two or more dimensions), `rest` (norms, biases,
scalars, and tables of positions, which at the embedding's rate would drown the tokens that they are added to).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

ROLES = ("matrix", "embedding", "head", "rest")


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rate of each role."""

    matrix: float
    embedding: float
    head: float
    rest: float


def roles(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter once, under its role."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    found: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if output is not None and parameter is getattr(output, "weight", None):
            role = "head"
        elif words is not None and parameter is words.weight:
            role = "embedding"
        elif id(parameter) in tables:
            role = "rest"
        else:
            role = "matrix" if _ndim(parameter) >= 2 else "rest"
        found[role].append(parameter)
    return found


def _ndim(parameter: nn.Parameter) -> int:
    """Dimensions of a parameter, also of one that ZeRO-3 has partitioned (its own shape is then empty)."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(model: nn.Module, rates: LearningRates, *, weight_decay: float) -> list[dict[str, Any]]:
    """One optimizer group a role; weight decay reaches matrices only.

    The matrix group stands first: its learning rate is the one that the Trainer logs.
    """
    return [
        {
            "params": parameters,
            "lr": getattr(rates, role),
            "weight_decay": weight_decay if role == "matrix" else 0.0,
            "role": role,
        }
        for role, parameters in roles(model).items()
        if parameters
    ]


def default_learning_rates(hidden_size: int, matrix: float | None = None) -> LearningRates:
    """Rates for a model of this width; `matrix` sets the scale of all and defaults to the measured best.

    Wider models want smaller steps: rates fall with the square root of the width. The values at width 256 are those
    of the sweep in docs/log.md.
    """
    scale = math.sqrt(256 / hidden_size)
    factor = scale if matrix is None else matrix / 2e-3
    return LearningRates(matrix=2e-3 * factor, embedding=0.3 * factor, head=8e-3 * factor, rest=2e-3 * factor)
