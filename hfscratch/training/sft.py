"""Supervised finetuning: TRL's trainer with our mixin, and LoRA adapters.

TRL replaces the model's head and loss by its own; `loss_difference` measures whether the two agree. Adapters are
PEFT's LoRA on every linear layer of the blocks, never on the head or the embedding: where these two are one table,
merging would corrupt it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from hfscratch import artifact
from hfscratch.errors import UsageError
from hfscratch.training.examples import IGNORED_LABEL
from hfscratch.training.trainer import TrainerMixin

HEADS = {"classifier", "score"}
"""Names of classifiers' heads, which PEFT trains whole by itself."""
BASE_FILE = "base.json"
"""In an adapter's folder: which weights it was trained on."""


class FinetuneTrainer(TrainerMixin, SFTTrainer):
    """TRL's supervised trainer with our checkpoints."""


def make_trainer(
    *, model: Any, args: Any, train_set: Any, validation_set: Any, tokenizer: Any, callbacks: Sequence[Any]
) -> FinetuneTrainer:
    """The trainer of answers."""
    return FinetuneTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=validation_set,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@torch.no_grad()
def loss_difference(trainer: Any, num_examples: int = 4) -> tuple[float, float]:
    """`(|difference|, loss)` of the trainer's loss on its first rows in one batch and the model's own, row by row.

    The first goes through TRL's collator, head and loss; the second reads each example alone, through the head that
    the model has, and knows no padding and no packing.
    """
    model, dataset = trainer.model, trainer.train_dataset
    rows = [dataset[i] for i in range(min(num_examples, len(dataset)))]
    batch = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in trainer.data_collator(rows).items()
    }
    was_training = model.training
    model.eval()
    try:
        theirs = trainer.compute_loss(model, batch).item()
        trainer._metrics["eval"].clear()
        summed, count = 0.0, 0
        for row in rows:
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                ids = torch.tensor([row["input_ids"][start : start + length]], device=model.device)  # (1, seq)
                labels = torch.tensor(row["labels"][start : start + length], device=model.device)[1:]  # (seq - 1)
                start += length
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (seq - 1, vocab)
                summed += nn.functional.cross_entropy(
                    logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"
                ).item()
                count += int((labels != IGNORED_LABEL).sum())
    finally:
        model.train(was_training)
    ours = summed / max(count, 1)
    return abs(theirs - ours), ours


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str] | None,
    fresh: Sequence[str] | None = None,
) -> Any:
    """The model with a fresh LoRA adapter, which alone is trainable.

    Args:
        target_modules: names of layers; every linear layer but the head if None.
        fresh: of a classifier: its weights that were drawn anew, whose modules are trained and kept whole.

    Raises: UsageError for layers that are not there or must not be adapted.
    """
    from peft import LoraConfig, get_peft_model

    for module, what in ((model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embedding")):
        name = next((name for name, each in model.named_modules() if each is module), "")
        for target in target_modules or ():
            if name == target or name.endswith(f".{target}"):
                raise UsageError(
                    f"finetune.lora.target_modules has '{target}', the model's {what}; an adapter there would be "
                    "ignored by the loss, or corrupt the merged model, so leave it out"
                )
    for target in target_modules or ():
        if fresh is not None and target.partition(".")[0] in HEADS:
            raise UsageError(
                f"finetune.lora.target_modules has '{target}', the classifier's head, which is trained whole anyway; "
                "leave it out"
            )
    config = LoraConfig(
        task_type=task_type(is_classifier=fresh is not None),
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(target_modules) if target_modules else "all-linear",
        modules_to_save=None if fresh is None else _modules_of(fresh),
        # gpt2's layers hold their matrices transposed
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        with _quiet():
            return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.split(".")[-1] for name, each in model.named_modules() if isinstance(each, nn.Linear)})
        raise UsageError(
            f"finetune.lora.target_modules {list(target_modules or ())} fit no layer of this model; its linear layers "
            f"are {', '.join(linear)} ({' '.join(str(error).split())[:120]})"
        ) from None


def task_type(*, is_classifier: bool) -> str:
    """What PEFT calls the task of an adapter."""
    return "SEQ_CLS" if is_classifier else "CAUSAL_LM"


def adapter_task_type(folder: Path) -> str | None:
    """The same, of the adapter in a folder; None if it does not say."""
    return _read_json(folder / "adapter_config.json").get("task_type")


def _modules_of(weights: Sequence[str]) -> list[str]:
    """The modules that hold these weights, but for heads and what is in them."""
    modules = {name.rpartition(".")[0] for name in weights}
    return sorted(name for name in modules if name.partition(".")[0] not in HEADS)


def load_adapter(model: Any, folder: Path, *, base_digest: str | None = None, is_trainable: bool = False) -> Any:
    """`model` with the adapter in `folder` on it.

    Args:
        base_digest: `weights_digest` of the folder that the model came from; compared with the adapter's, if it has it.

    Raises: UsageError if the folder holds no adapter, or one that was made for another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    config_path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file() or not weights.is_file():
        raise UsageError(f"{folder} holds no adapter (adapter_config.json and adapter_model.safetensors)")
    recorded = _read_json(folder / BASE_FILE)
    if base_digest and recorded.get("sha256") and recorded["sha256"] != base_digest:
        raise UsageError(
            f"the adapter in {folder} was trained on other weights than this base's (a {recorded.get('model_type')}, "
            f"sha256 {recorded['sha256'][:12]}…, and not {base_digest[:12]}…); give the base it was made for"
        )
    layers = dict(model.named_modules())
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                name, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
                weight = getattr(layers.get(name), "weight", None)
                wanted = None if weight is None else set(weight.shape)
                if kind and (wanted is None or not set(file.get_slice(key).get_shape()) & wanted):
                    found = "has no such layer" if wanted is None else f"has it as {tuple(weight.shape)}"  # type: ignore[union-attr]
                    raise UsageError(
                        f"the adapter in {folder} was made for another base: it adapts {name}, and this model {found}"
                    )
        with _quiet():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(
            f"the adapter in {folder} does not fit this base: {' '.join(str(error).split())[:200]}"
        ) from None


def save_adapter(model: Any, folder: Path, *, base: str, base_digest: str) -> None:
    """Writes the adapter so that `PeftModel` opens it, and beside it which weights it belongs to."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # so that equal adapters are equal files
        config.inference_mode = True
    model.save_pretrained(str(folder), save_embedding_layers=False)  # none is adapted, so nothing to look up
    (folder / "README.md").unlink(missing_ok=True)  # a card of blanks; `push` writes the real one
    model_type = model.get_base_model().config.model_type
    artifact.write_json(folder / BASE_FILE, {"model_type": model_type, "sha256": base_digest})


def weights_digest(folder: Path) -> str:
    """The digest of a model folder's weights, whatever the folder is called."""
    return artifact.digest_json([artifact.digest_file(path) for path in sorted(folder.glob("*.safetensors"))])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's use of names that transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
