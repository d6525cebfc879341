"""A learning rate per role, the setting that was measured to matter most (docs/log.md), and Muon for the matrices.

A parameter's role is found by structure, not by name, so stock architectures get the same treatment:

- `matrix`: every weight of two or more dimensions that is none of the following;
- `embedding`: the table that token ids are looked up in, if it is not the head too;
- `table`: further tables looked up by token id (value embeddings), at half of the embedding's rate;
- `head`: the matrix that hidden states are read out with, also where it is the embedding too: what is read out of must
  move slowly;
- `rest`: norms, biases, scalars, and tables of positions or segments, which at the embedding's rate would drown the
  tokens that they are added to.

Not covered: a model whose backbone has tables of token ids as well as tables of positions of the same length.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.pytorch_utils import Conv1D

from hfscratch.errors import UsageError

ROLES = ("matrix", "embedding", "table", "head", "rest")
TABLE_RATE = 0.5
"""Rate of further tables of token ids, against the embedding's. Source: nanochat's value embeddings."""

ADAM_RATE, MUON_RATE = 2e-3, 0.02
"""Of matrices at width 256, by the sweeps in docs/log.md."""


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rate of each role; that of `table` follows `embedding`."""

    matrix: float
    embedding: float
    head: float
    rest: float


def roles(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter once, under its role."""
    head = _head_weight(model)
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tables = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter is head:
            role = "head"
        elif words is not None and parameter is words.weight:
            role = "embedding"
        elif id(parameter) in tables:
            role = "table" if _is_of_tokens(tables[id(parameter)], words, model) else "rest"
        else:
            role = "matrix" if _is_matrix(parameter) else "rest"
        found[role].append(parameter)
    return found


def _head_weight(model: nn.Module) -> nn.Parameter | None:
    """The matrix that hidden states are read out with: to the vocabulary, or to the labels of a classifier."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", model)
    if output is None and backbone is not model:
        inside = {id(module) for module in backbone.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        output = next((module for module in reversed(outside) if isinstance(module, nn.Linear)), None)
    return getattr(output, "weight", None)


def _is_of_tokens(table: nn.Embedding, words: nn.Module | None, model: nn.Module) -> bool:
    """Whether a table other than the embedding is looked up by token id: it has as many rows as there are tokens.

    Where the context is as long as the vocabulary is large, tables of positions have so many too; models with rotary
    positions have no such tables.
    """
    if table.num_embeddings != getattr(words, "num_embeddings", None):
        return False
    config = getattr(model, "config", None)
    is_rotary = getattr(config, "rope_parameters", None) is not None
    return is_rotary or table.num_embeddings != getattr(config, "max_position_embeddings", None)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter has two dimensions to speak of; one that ZeRO-3 has partitioned keeps them elsewhere."""
    return sum(size > 1 for size in getattr(parameter, "ds_shape", parameter.shape)) >= 2


def _scale_of_embedding(model: nn.Module) -> float:
    """What the embedding multiplies its rows with: 1 for most models."""
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    # Gemma's is a buffer, which may lie on the meta device, with the number beside it; Bart's is the number.
    return float(getattr(words, "scalar_embed_scale", getattr(words, "embed_scale", 1.0)))


def parameter_groups(
    model: nn.Module, rates: LearningRates, *, weight_decay: float, muon: bool = False
) -> list[dict[str, Any]]:
    """One optimizer group a role; weight decay reaches matrices only.

    With `muon`, the matrices' group is for it, those that are laid out as (in, out) have one of their own, and what is
    no matrix by itself (kernels of convolutions) is under `rest`.

    The matrix group stands first: its learning rate is the one that the Trainer logs. An embedding whose rows are
    multiplied before they are used (Gemma's) learns that much more slowly, so that what is used moves by its rate.
    """
    rate = {role: getattr(rates, role) for role in ROLES if role != "table"}
    rate["table"] = TABLE_RATE * rates.embedding
    rate["embedding"] /= _scale_of_embedding(model)
    found = roles(model)
    layouts: list[tuple[str, list[nn.Parameter], dict[str, Any]]] = []
    if muon:
        by_layout = _matrices_by_layout(model, found.pop("matrix"))
        found["rest"] += by_layout.pop(None, [])
        layouts += [
            ("matrix", some, {"muon": True, "is_transposed": is_transposed, "parts": parts})
            for (is_transposed, parts), some in by_layout.items()
        ]
    layouts += [(role, parameters, {}) for role, parameters in found.items()]
    return [
        {
            "params": parameters,
            "lr": rate[role],
            "weight_decay": weight_decay if role == "matrix" else 0.0,
            "role": role,
            **layout,
        }
        for role, parameters, layout in layouts
        if parameters
    ]


def _matrices_by_layout(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[Any, list[nn.Parameter]]:
    """`{(is_transposed, parts): parameters}`; under None what has two dimensions and is no matrix, or more than three.

    A matrix is the weight of a module that is no convolution, or a stack of such, one for each expert; biases of
    experts and Mamba's decays are none. It is transposed if it is laid out as (in, out). It has three parts if it makes
    queries, keys and values at once, which is seen by its shape.
    """
    owner = {id(each): (name, module) for module in model.modules() for name, each in module._parameters.items()}
    config = getattr(model, "config", None)
    found: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        name, module = owner[id(parameter)]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        is_convolution = isinstance(module, nn.modules.conv._ConvNd)
        layout: Any = None
        if len(shape) == 3 and not is_convolution:
            layout = (bool(getattr(module, "is_transposed", False)), 1)
        elif len(shape) == 2 and name == "weight" and not is_convolution:
            is_transposed = isinstance(module, Conv1D)
            rows, columns = reversed(shape) if is_transposed else shape
            is_wide = rows == 3 * columns and rows != getattr(config, "intermediate_size", None)
            layout = (is_transposed, 3 if is_wide else 1)
        found[layout].append(parameter)
    return found


def default_learning_rates(hidden_size: int, matrix: float | None = None, *, muon: bool = False) -> LearningRates:
    """Rates for a model of this width; `matrix` sets the scale of all and defaults to the measured best.

    Wider models want smaller steps: rates fall with the square root of the width. The values at width 256 are those
    of the sweeps in docs/log.md.
    """
    best = MUON_RATE if muon else ADAM_RATE
    factor = math.sqrt(256 / hidden_size) if matrix is None else matrix / best
    return LearningRates(matrix=best * factor, embedding=0.3 * factor, head=8e-3 * factor, rest=2e-3 * factor)


# ---------------------------------------------------------------------------------------------------------------------
# Muon

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""`(a, b, c)` of the polynomial `a·X + b·XXᵀX + c·XXᵀXXᵀX`, iteration by iteration. Each is the best one for the
singular values that those before it leave, so that fewer of them are the best that so many can do. Source: Amsel et al.
2025 (arXiv 2505.16932), with the safety factor 1.02 of modded-nanogpt."""
SAFETY = 1.02
LARGEST_STACK = 2**25
"""Values of the matrices that are worked on together, at most, if that is enough for each process to have one."""


@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """What `optim_args` of a recipe with `optim: muon` may set."""

    ns_steps: int = 3
    """Iterations of the orthogonalization. Five take two thirds more time, and ended at the same loss within noise
    (docs/optimizer.md)."""
    momentum: float = 0.9
    """That of the matrices' gradients, by Nesterov's rule."""
    momentum_start: float = 0.85
    """The momentum of the first step …"""
    momentum_warmup: float = 0.3
    """… which grows to its value over this share of the run."""
    beta2: float = 0.95
    """Decay of the mean square of each row's updates, by which they are divided; 0 not to. Source: NorMuon, Li et al.
    2025 (arXiv 2510.05491)."""

    def __post_init__(self) -> None:
        if not 1 <= self.ns_steps <= len(POLAR_EXPRESS):
            raise UsageError(f"optim_args: ns_steps is {self.ns_steps}; it must be from 1 to {len(POLAR_EXPRESS)}")
        for name in ("momentum", "momentum_start", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UsageError(f"optim_args: {name} is {value}; it must be at least 0 and below 1")
        if not 0 <= self.momentum_warmup <= 1:
            raise UsageError(f"optim_args: momentum_warmup is {self.momentum_warmup}; it is a share of the run")


def muon_settings(optim_args: str | None) -> MuonSettings:
    """What a recipe's `optim_args` say, as transformers writes them: `ns_steps=3,beta2=0`.

    Raises: UsageError.
    """
    kinds: dict[str, Any] = {each.name: type(each.default) for each in fields(MuonSettings)}
    values: dict[str, Any] = {}
    for word in (optim_args or "").replace(" ", "").split(","):
        if not word:
            continue
        name, _, value = word.partition("=")
        if name not in kinds:
            raise UsageError(f"optim_args: muon has no '{name}'; it has {', '.join(kinds)}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise UsageError(f"optim_args: {name} is '{value}'; it must be a number, as in {name}=…") from None
    return MuonSettings(**values)


def orthogonalize(matrices: torch.Tensor, *, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The nearest matrices whose singular values are all 1, about: Polar Express, a Newton–Schulz iteration.

    Args:
        matrices: (batch, rows, columns).
        dtype: to multiply in.

    Returns: (batch, rows, columns) in the dtype of `matrices`; zero where they are.
    """
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if is_tall else matrices
    norm = torch.linalg.matrix_norm(x.float(), keepdim=True)
    x = (x / (norm * SAFETY + 1e-30)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Muon for the groups that say `muon: True`, and AdamW for the others.

    The gradients of a matrix, summed with momentum, are replaced by the nearest orthogonal matrix, and, with `beta2`,
    their rows are brought to one size; so every direction is learnt at the same rate. A step is scaled by
    √max(1, rows/columns). A projection that makes queries, keys and values at once is read as three.
    Sources: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), nanochat, and those above.

    Of several processes each orthogonalizes its share of the matrices; all keep the momentum of all (under FSDP, of
    their shards), so that a checkpoint holds the same whoever writes it.

    Args:
        groups: from `parameter_groups`, with `muon`.
        max_steps: of the run, which the momentum's warmup is a share of.
        dtype: to orthogonalize in.
        kwargs: AdamW's own.
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        settings: MuonSettings,
        *,
        max_steps: int,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        super().__init__(groups, **kwargs)
        self._step_supports_amp_scaling = False  # so that fp16's scaler passes over steps that are not finite
        self.settings = settings
        self.warmup_steps = settings.momentum_warmup * max_steps
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:  # they stand first, and states are made in this order, in which they are loaded too
            if group.get("muon"):
                self._step_of_matrices(group)
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_of_matrices(self, group: Mapping[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            by_shape[tuple(parameter.shape)].append(parameter)
            if not (state := self.state[parameter]):
                state["step"] = torch.tensor(0.0)
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                if self.settings.beta2:
                    rows = (*parameter.shape[:-2], parameter.shape[-1 if group["is_transposed"] else -2])
                    state["row_square"] = torch.zeros(rows, device=parameter.device)
        for shape, parameters in by_shape.items():
            some = max(_world_size(), LARGEST_STACK // math.prod(shape))
            for first in range(0, len(parameters), some):
                self._step_of_stack(group, parameters[first : first + some])

    def _step_of_stack(self, group: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        """Of matrices of one shape, together."""
        settings = self.settings
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        step = states[0]["step"].item()
        warm = min(1.0, (step - 1) / self.warmup_steps) if self.warmup_steps else 1.0
        momentum = settings.momentum_start + warm * (settings.momentum - settings.momentum_start)
        gradients = [_local(parameter.grad) for parameter in parameters]
        buffers = [_local(state["momentum_buffer"]) for state in states]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)
        whole = torch.stack([_whole(parameter.grad) for parameter in parameters])
        updates = self._updates(whole, states, is_transposed=group["is_transposed"], parts=group["parts"])
        decay = group["weight_decay"] * group["lr"]
        if decay and "initial_lr" in group:  # it falls with the schedule, and the step too: so with its square
            decay *= group["lr"] / group["initial_lr"]
        for parameter, update in zip(parameters, updates, strict=True):
            mine, change = _local(parameter), _part(update, parameter)
            if decay:  # cautious: only where the step goes the same way
                mine.sub_(mine * (change * mine > 0), alpha=decay)
            mine.sub_(change.to(mine.dtype), alpha=group["lr"])

    def _updates(
        self, gradients: torch.Tensor, states: Sequence[dict[str, Any]], *, is_transposed: bool, parts: int
    ) -> torch.Tensor:
        """What is to be subtracted, before the learning rate; shaped as `gradients`, (matrices, …, rows, columns)."""
        x = gradients.mT if is_transposed else gradients
        rows, columns = x.shape[-2:]
        done = _shared(
            x.reshape(-1, rows // parts, columns),
            lambda some: orthogonalize(some, steps=self.settings.ns_steps, dtype=self.dtype),
        )
        x = done.reshape(x.shape) * math.sqrt(max(1.0, rows / parts / columns))
        if self.settings.beta2:
            square = x.float().square().mean(-1)  # (matrices, …, rows)
            torch._foreach_lerp_([state["row_square"] for state in states], list(square), 1 - self.settings.beta2)
            scale = torch.stack([state["row_square"] for state in states]).clamp_min(1e-10).rsqrt()
            # The matrix as a whole stays as large as it was.
            before, after = square.sum(-1), (square * scale.square()).sum(-1)
            scale *= (before / after.clamp_min(1e-20)).sqrt()[..., None]
            x = x * scale[..., None].to(x.dtype)
        return x.mT if is_transposed else x


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _shared(matrices: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`compute(matrices)`, of which each process does its share."""
    world_size = _world_size()
    if world_size == 1:
        return compute(matrices)
    share = math.ceil(len(matrices) / world_size)
    first = share * torch.distributed.get_rank()
    mine = matrices[first : first + share]
    own = matrices.new_zeros(share, *matrices.shape[1:])
    if len(mine):
        own[: len(mine)] = compute(mine)
    every = matrices.new_empty(share * world_size, *matrices.shape[1:])
    torch.distributed.all_gather_into_tensor(every, own)
    return every[: len(matrices)]


def _local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor that FSDP has divided; any other itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """Of a whole tensor, what this process has of one that is divided as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def require_deepspeeds(arguments: Mapping[str, Any], engine: str) -> None:
    """Whether DeepSpeed's Muon can do what a recipe asks of Muon.

    Args:
        arguments: the training arguments that the recipe gives.
        engine: `engines.name_of`.

    Raises: UsageError.
    """
    if engine == "zero0":
        raise UsageError("optim is muon, which DeepSpeed's stage 0 would make plain SGD; launch with ZeRO-1, 2 or 3")
    settings = muon_settings(arguments.get("optim_args"))
    for name, only in {"ns_steps": 5, "momentum_start": None, "momentum_warmup": 0.0, "beta2": 0.0}.items():
        value = getattr(settings, name)
        if f"{name}=" in arguments.get("optim_args", "").replace(" ", "") and value != only:
            raise UsageError(
                f"optim_args: {name} is {value}, and DeepSpeed's Muon has no such setting; leave it out, or launch "
                "with accelerate_configs/ddp.yaml"
            )
    if arguments.get("max_grad_norm"):
        raise UsageError(
            f"max_grad_norm is {arguments['max_grad_norm']}, and DeepSpeed's Muon would clip what it has made "
            "orthogonal; leave it out"
        )


def deepspeed_muon(
    groups: Sequence[dict[str, Any]],
    optim_args: str | None,
    config: dict[str, Any],
    *,
    dtype: torch.dtype,
    betas: Any,
    eps: float,
) -> Any:
    """DeepSpeed's own Muon, since ZeRO divides what another one would have to see whole. The roles and their rates are
    ours; it has five iterations of its own coefficients, one momentum from the first step on, no mean square of rows.

    Args:
        groups: from `parameter_groups`, with `muon`.
        config: DeepSpeed's, of which what would break it is changed: gradients are not clipped, because it would clip
            the orthogonal ones, whose norm is that of the model's width; and ZeRO-3 does not scatter them.
        dtype: that gradients are communicated in.

    Raises: UsageError for what it cannot honour.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    zero = config["zero_optimization"]
    if any(group.get("is_transposed") for group in groups):
        raise UsageError(
            "optim is muon, and DeepSpeed's takes the rows of this model's matrices for columns; launch with "
            "accelerate_configs/ddp.yaml"
        )
    config["gradient_clipping"] = 0.0
    config["zero_force_ds_cpu_optimizer"] = False  # where it is offloaded, accelerate would put Adam in its place
    zero["reduce_scatter"] = False
    momentum = muon_settings(optim_args).momentum
    theirs: list[dict[str, Any]] = []
    for group in groups:
        is_muon = group.get("muon", False)
        for parameter in group["params"]:
            parameter.use_muon = is_muon
        own = {"momentum": momentum} if is_muon else {"betas": betas, "eps": eps}
        kept = {name: group[name] for name in ("params", "lr", "weight_decay", "role")}
        theirs.append({**kept, **own, "use_muon": is_muon, "name": f"{group['role']}-{len(theirs)}"})
    optim = MuonWithAuxAdam(
        theirs, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"betas": betas, "eps": eps}
    )
    if zero["stage"] == 3:

        def round_momenta(loaded: torch.optim.Optimizer) -> None:
            """It keeps them in `dtype`, and loads them in that of the weights."""
            for state in loaded.state.values():
                if "momentum_buffer" in state:
                    state["momentum_buffer"] = state["momentum_buffer"].to(dtype)

        optim.register_load_state_dict_post_hook(round_momenta)
    return optim
