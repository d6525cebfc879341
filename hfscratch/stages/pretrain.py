"""pretrain: trains a causal language model from random weights on the tokenizer's token ids.

The order of rows is an index over document lengths (`tokens.packing`), the loop is `transformers.Trainer` with our
mixin (`training.trainer`). Interrupted, the same command goes on from the last checkpoint under `.work/pretrain/`.

Writes `<out>/pretrain/`: a plain `from_pretrained` folder with model, tokenizer and, for Scratch, its code.
Hardware is not the recipe's: `accelerate launch --config_file … -m hfscratch pretrain RECIPE`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import MachineError, UsageError
from hfscratch.recipe import Recipe, open_field, to_dict
from hfscratch.training.arguments import UNKEYED, argument_names, as_usage_errors, refused

logger = logging.getLogger(__name__)

INPUTS = ("tokenizer",)
VERSION = 1


DEFAULT_TOKENS_PER_PARAMETER = 20
NUM_EVALUATIONS = 8
MAX_EVAL_TOKENS = 32768
PROBED_WIDTHS = 4096
"""Models of up to this width times depth are tried with their weights before any stage works; larger ones without."""
PROBED_TOKENS = 256
"""Tokens of the row that such a trial reads, at most."""
COMPILE_PAYS_AFTER_MINUTES = 30
"""Compiling takes a minute or two on a CPU; on shorter runs it does not earn that back."""


def _model_names(values: Mapping[str, Any]) -> Mapping[str, str]:
    from hfscratch.planning.shape import OURS as FROM_TOKENIZER
    from hfscratch.planning.shape import config_fields

    fields = config_fields(values.get("type", "scratch"))
    return {name: kind for name, kind in fields.items() if name not in FROM_TOKENIZER}


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What the model is: a type, a depth, and any field of that type's own configuration."""

    type: str = "scratch"
    """`scratch` (our architecture) or any causal type of transformers: llama, qwen3, gpt2, …"""

    depth: int | None = None
    """The one dial: layers; the width is 64 a layer and heads are 64 wide. 4 if no shape is given at all."""

    fields: dict[str, Any] = open_field(
        _model_names,
        dict.fromkeys(("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"), "it comes from the tokenizer"),
    )

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise UsageError(f"depth is {self.depth}; it must be at least 1")
        if self.depth is not None and "num_hidden_layers" in self.fields:
            raise UsageError(f"depth is {self.depth} and num_hidden_layers is given too; give one of them")
        if self.type != "scratch":
            from hfscratch.planning.shape import config_fields

            config_fields(self.type)
        hidden, heads = self.fields.get("hidden_size"), self.fields.get("num_attention_heads")
        if hidden and heads and hidden % heads and "head_dim" not in self.fields:
            raise UsageError(
                f"hidden_size is {hidden}, which {heads} attention heads do not divide; "
                f"take {heads * max(1, round(hidden / heads))}, or give head_dim"
            )
        key_value = self.fields.get("num_key_value_heads")
        if heads and key_value and heads % key_value:
            raise UsageError(f"num_attention_heads is {heads}, which {key_value} key-value heads do not divide")


def _require_positive(name: str, value: Any) -> None:
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"{name} is {value}; it must be a positive number")


@dataclass(frozen=True, kw_only=True)
class RoleRates:
    """Peak learning rate of each role; what is not given is derived from the width."""

    matrix: float | None = None
    """Weights of two or more dimensions inside the blocks."""
    embedding: float | None = None
    """Tables looked up by id."""
    head: float | None = None
    """The output matrix, if it is not tied to the embedding."""
    rest: float | None = None
    """Norms, biases, scalars."""

    def __post_init__(self) -> None:
        for name, value in to_dict(self).items():
            _require_positive(f"learning_rates.{name}", value)


@dataclass(frozen=True, kw_only=True)
class PretrainSection:
    """How the model is trained: what the batch is, never on what hardware. Any field of transformers'
    TrainingArguments may stand here too."""

    objective: Literal["clm"] = "clm"
    """Causal language modelling: each token is predicted from those before it."""

    sequence_length: int = 256
    """Tokens in a row, the longest context that the model is trained on."""

    batch_tokens: int | None = None
    """Tokens an optimizer step, over all processes together; derived from the token budget if not given."""

    max_tokens: int | None = None
    """Tokens to train on, repeats counted; 20 a parameter if not given, but at most `max_epochs` of the corpus."""

    max_epochs: float = 8.0
    """Where `max_tokens` is derived, the most often that the corpus is read."""

    isolate_documents: bool = True
    """Whether a token sees only its own document, when several share a row."""

    learning_rates: RoleRates = RoleRates()
    """Peak learning rates by role. `learning_rate` (of the matrices) scales all that are not given here."""

    early_stopping_patience: int | None = 3
    """Stop after this many validations without improvement; the best checkpoint is what is published."""

    eval_tokens: int | None = None
    """Validation tokens read at each validation while training (`evaluate` reads them all); a 40th of the training
    tokens if not given, 32768 at most."""

    sample_prompt: str = ""
    """What the sample generated at each validation begins with."""

    sample_tokens: int = 48
    """Tokens of that sample; 0 for none."""

    arguments: dict[str, Any] = open_field(lambda values: argument_names(), refused("pretrain.batch_tokens"))

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_tokens", "max_tokens", "max_epochs", "eval_tokens"):
            _require_positive(name, getattr(self, name))
        for name in ("max_steps", "num_train_epochs", "learning_rate", "adam_epsilon", "eval_steps", "save_steps"):
            _require_positive(name, self.arguments.get(name))
        if {"max_steps", "num_train_epochs"} <= self.arguments.keys():
            raise UsageError("max_steps and num_train_epochs both say how long training is; give one of them")
        for name in ("adam_beta1", "adam_beta2"):
            value = self.arguments.get(name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 0 and below 1")
        if not self.arguments.get("weight_decay", 0.0) >= 0:
            raise UsageError(f"weight_decay is {self.arguments['weight_decay']}; it must not be negative")
        if self.sequence_length < 2:
            raise UsageError(f"sequence_length is {self.sequence_length}; a row needs at least 2 tokens")
        if self.batch_tokens is not None and self.batch_tokens % self.sequence_length:
            nearest = max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length
            raise UsageError(
                f"batch_tokens is {self.batch_tokens}, which rows of {self.sequence_length} tokens do not divide; "
                f"the nearest value that does is {nearest}"
            )
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise UsageError(
                f"early_stopping_patience is {self.early_stopping_patience}; it must be at least 1, or null"
            )
        if self.sample_tokens < 0:
            raise UsageError(f"sample_tokens is {self.sample_tokens}; it must not be negative")


SECTIONS = {"model": ModelSection, "pretrain": PretrainSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of both sections that change the result."""
    pretrain = to_dict(recipe.section("pretrain"))
    model = to_dict(recipe.sections.get("model") or ModelSection())
    return {"model": model, "pretrain": {name: value for name, value in pretrain.items() if name not in UNKEYED}}


def check(recipe: Recipe) -> None:
    """Checks what needs transformers, before any stage works: the configuration, and the trainer's arguments."""
    section: PretrainSection = recipe.section("pretrain")
    tokenizer = recipe.sections.get("tokenizer")
    ids = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = _config(recipe, vocab_size=tokenizer.vocab_size if tokenizer else 4096, special_ids=ids)
    _require_usable(_model_class(config), config, section)
    arguments = _training_arguments(
        section, Path("unused"), recipe.seed, max_steps=10**6, rates=None, has_validation=True
    )
    with as_usage_errors("pretrain"):
        from transformers import Trainer
        from transformers.integrations import get_reporting_integration_callbacks

        get_reporting_integration_callbacks(arguments.report_to)
        Trainer.get_optimizer_cls_and_kwargs(arguments)


@dataclass(frozen=True)
class _Budget:
    """How long training is, in the units of everybody involved."""

    rows_per_step: int
    max_steps: int
    sequence_length: int

    @property
    def batch_tokens(self) -> int:
        return self.rows_per_step * self.sequence_length

    @property
    def tokens(self) -> int:
        return self.max_steps * self.batch_tokens


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Trains, proves that the published folder reloads to the same logits, publishes."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    from hfscratch import tokens
    from hfscratch.planning.shape import count_parameters, training_flops_per_token
    from hfscratch.training import batch, callbacks, checkpoints, precision, processes
    from hfscratch.training.trainer import PretrainTrainer, train_or_resume

    if int(transformers.__version__.split(".")[0]) < 5:
        raise MachineError(f"pretraining needs transformers 5, and {transformers.__version__} is installed")
    section: PretrainSection = recipe.section("pretrain")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    started = time.perf_counter()

    tokenizer_folder = workspace.input("tokenizer")
    tokenizer_manifest = artifact.read_manifest(tokenizer_folder)
    assert tokenizer_manifest is not None
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    room = section.sequence_length - len(tokenizer(section.sample_prompt)["input_ids"])
    if room < 1:
        raise UsageError(
            f"pretrain.sample_prompt fills the whole context of pretrain.sequence_length={section.sequence_length}; "
            "shorten it"
        )
    train_split = tokens.TokenizedSplit(tokenizer_folder / "tokens", "train")
    index = tokens.PackingIndex(train_split.lengths, sequence_length=section.sequence_length, seed=recipe.seed)
    has_validation = "validation" in tokens.splits_in(tokenizer_folder / "tokens")
    bytes_per_token = train_split.num_bytes / (int(train_split.lengths.sum()) - len(train_split))

    chosen = precision.choose_precision()  # before TrainingArguments writes its own choice into the environment
    special_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = _config(recipe, vocab_size=len(tokenizer), special_ids=special_ids)
    model_class = _model_class(config)

    # ZeRO-3 partitions a model while it is made, and learns of that from TrainingArguments: hence these come first.
    checkpoint_folder = workspace.work / workspace.key[:16]
    make_arguments = functools.partial(
        _training_arguments, section, checkpoint_folder, recipe.seed, has_validation=has_validation
    )
    make_arguments(max_steps=1, rates=None)
    # What a process measures for itself, the first measures for all.
    if not processes.broadcast(workspace.is_stale, world_size):
        return []
    chosen = processes.broadcast(chosen, world_size)
    transformers.set_seed(recipe.seed)
    model = model_class.from_config(config, dtype=torch.float32)
    num_parameters = _num_parameters(model) or count_parameters(model)
    budget = _budget(section, num_parameters, int(train_split.lengths.sum()), index.rows_per_epoch)
    if budget.rows_per_step % world_size:
        nearest = max(1, round(budget.rows_per_step / world_size)) * world_size * section.sequence_length
        raise UsageError(
            f"pretrain.batch_tokens is {budget.batch_tokens}: its {budget.rows_per_step} rows do not divide over "
            f"{world_size} processes; the nearest value that does is {nearest}"
        )
    rows_per_process = budget.rows_per_step // world_size
    micro_rows = processes.broadcast(
        batch.micro_batch_rows(rows_per_process, section.sequence_length, config), world_size
    )
    rates = _rates(section, config)

    train_rows = tokens.PackedRows(
        train_split,
        index,
        num_rows=budget.max_steps * budget.rows_per_step,
        bos_token_id=tokenizer.bos_token_id,
        isolate_documents=section.isolate_documents,
    )
    validation_rows: Any = None
    eval_bytes_per_token = None
    eval_tokens = section.eval_tokens or min(MAX_EVAL_TOKENS, budget.tokens // 40)
    if has_validation:
        validation_split = tokens.TokenizedSplit(tokenizer_folder / "tokens", "validation")
        num_predicted = int(validation_split.lengths.sum()) - len(validation_split)
        eval_bytes_per_token = validation_split.num_bytes / num_predicted
        length = min(section.sequence_length, int(validation_split.lengths.sum()))
        validation_index = tokens.PackingIndex(validation_split.lengths, sequence_length=length, seed=recipe.seed)
        validation_rows = tokens.PackedRows(
            validation_split,
            validation_index,
            num_rows=min(validation_index.rows_per_epoch, max(1, eval_tokens // length)),
            bos_token_id=tokenizer.bos_token_id,
            isolate_documents=section.isolate_documents,
        )

    seconds = None
    if world_size == 1:
        if torch.cuda.is_available():
            model.to("cuda")
        sample = tokens.collate([train_rows[i] for i in range(micro_rows)])
        per_micro = batch.seconds_per_step(model, sample, bf16=chosen.is_bf16)
        seconds = batch.training_seconds(
            budget.max_steps,
            per_micro * (rows_per_process // micro_rows),
            evaluation_tokens=len(validation_rows or ()) * section.sequence_length * NUM_EVALUATIONS,
            tokens_per_step=budget.batch_tokens,
        )
    compiled = _compile_reason(section, seconds)
    arguments = make_arguments(
        max_steps=budget.max_steps,
        rates=rates,
        chosen=chosen,
        micro_rows=micro_rows,
        accumulation=rows_per_process // micro_rows,
        compile_model=compiled[0],
    )
    model_bytes = batch.training_state_bytes(num_parameters)
    activations = micro_rows * section.sequence_length * batch.activation_bytes_per_token(config)
    flops = training_flops_per_token(model, section.sequence_length) if world_size == 1 else 0
    epochs = budget.tokens / (index.rows_per_epoch * section.sequence_length)
    plan = [
        ("model", f"{_shape(config)}, {num_parameters / 1e6:.2f} M parameters"),
        (
            "tokens",
            f"{budget.tokens:,} ({epochs:.2g} times the train split) in {budget.max_steps:,} steps of "
            f"{budget.batch_tokens:,} ({world_size} process{'es' if world_size > 1 else ''} × {micro_rows} rows × "
            f"{rows_per_process // micro_rows} accumulated)",
        ),
        ("precision", f"{chosen.name}, because {chosen.reason}"),
        ("compiled", compiled[1]),
        (
            "memory",
            f"about {(model_bytes + activations) / 1e9:.2f} GB more than now ({model_bytes / 1e9:.2f} model and "
            f"optimizer, {activations / 1e9:.2f} activations) of {batch.free_memory_bytes() / 1e9:.1f} GB free",
        ),
        (
            "time",
            f"about {_minutes(seconds)} ({seconds and budget.tokens / seconds:,.0f} tokens/s, measured on this batch)"
            if seconds
            else "shown by the progress bar after the first steps",
        ),
    ]
    if flops:
        plan.insert(2, ("compute", f"{flops * budget.tokens / 1e12:,.1f} TFLOP, {flops / 1e6:,.1f} MFLOP a token"))
    if rank == 0:
        logger.info("pretrain will train:\n%s", "\n".join(f"  {label:<10} {value}" for label, value in plan))
    if model_bytes + activations > batch.free_memory_bytes() and world_size == 1:
        raise MachineError(
            f"training {num_parameters / 1e6:.0f} M parameters needs about {(model_bytes + activations) / 1e9:.1f} GB, "
            f"and {batch.free_memory_bytes() / 1e9:.1f} GB are free; set a smaller model.depth"
        )

    if rank == 0:
        checkpoints.drop_other_runs(workspace.work, checkpoint_folder)
        artifact.make_folder(checkpoint_folder)
        artifact.require_free_space(checkpoint_folder, 4 * model_bytes)
    stop = callbacks.StopOnSignal()
    progress = callbacks.ProgressBar(
        tokens_per_step=budget.batch_tokens,
        bytes_per_token=bytes_per_token,
        eval_bytes_per_token=eval_bytes_per_token,
    )
    trainer_callbacks: list[Any] = [stop, progress]
    if has_validation and section.sample_tokens:
        trainer_callbacks.append(
            callbacks.Samples(
                tokenizer,
                prompt=section.sample_prompt,
                max_new_tokens=min(section.sample_tokens, room),
                seed=recipe.seed,
            )
        )
    if arguments.load_best_model_at_end and section.early_stopping_patience:
        trainer_callbacks.append(transformers.EarlyStoppingCallback(section.early_stopping_patience))
    with as_usage_errors("pretrain"):
        trainer = PretrainTrainer(
            model=model,
            args=arguments,
            data_collator=tokens.collate,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
            callbacks=trainer_callbacks,
        )
    trainer.learning_rates = rates
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(recipe.seed)

    before_training = time.perf_counter() - started
    train_or_resume(trainer, checkpoint_folder, stop=stop, section="pretrain")

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.use_cache = True  # the Trainer switched it off for training; a user wants it
    probe = tokens.collate([train_rows[0]])["input_ids"]
    reference = _logits(model, probe.to(arguments.device))
    ahead = _looks_ahead(model, probe.to(arguments.device))
    staging: Any = workspace.staging() if rank == 0 else contextlib.nullcontext(workspace.work / "staging")
    with staging as folder:
        processes.wait_for_everyone(world_size)
        trainer.save_model(str(folder))
        processes.wait_for_everyone(world_size)
        if rank == 0:
            history, samples = _history(trainer.state.log_history, budget.batch_tokens, progress)
            loads_best = arguments.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
            published_step = trainer.state.best_global_step if loads_best else trainer.state.global_step
            train_seconds = max((each.get("seconds", 0.0) for each in trainer.state.log_history), default=0.0)
            metrics = {
                "parameters": num_parameters,
                "train_tokens": trainer.state.global_step * budget.batch_tokens,
                "steps": trainer.state.global_step,
                "published_step": published_step,
                "tokens_per_s": trainer.state.global_step * budget.batch_tokens / max(train_seconds, 1e-9),
                "train_seconds": train_seconds,
                "precision": chosen.name,
                "processes": world_size,
                "learning_rates": dataclasses.asdict(rates),
                "predicted_seconds": seconds,
            }
            tokenizer.model_max_length = section.sequence_length
            tokens.save_tokenizer(tokenizer, folder)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same in plain text
            artifact.write_json(folder / "metrics.json", {"history": history, "samples": samples, "plan": plan})
            workspace.publish(
                folder,
                section=key_fields(recipe),
                inputs={"tokenizer": tokenizer_manifest["digest"]},
                proofs=[
                    _reload_proof(folder, probe, reference, model),
                    Proof(
                        "no token sees those after it",
                        ahead <= 1e-4 * max(1.0, reference.abs().max().item()),
                        f"changing the second half of a row moves the logits of the first by {ahead:.1e} at most",
                    ),
                ],
                metrics=metrics,
                timings={"prepare": before_training, "train": train_seconds},
            )
            shutil.rmtree(checkpoint_folder, ignore_errors=True)
    processes.wait_for_everyone(world_size)
    if rank != 0:
        return []
    validated = [each for each in history if "eval_bits_per_byte" in each]
    best = min((each["eval_bits_per_byte"] for each in validated), default=None)
    return [
        ("model", plan[0][1]),
        (
            "trained",
            f"{metrics['train_tokens']:,} tokens in {_minutes(train_seconds)}, {metrics['tokens_per_s']:,.0f} tokens/s",
        ),
        ("validation", f"{best:.3f} bits per byte on {len(validation_rows):,} rows" if best else "none (no split)"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The parts of `run`


def _config(recipe: Recipe, *, vocab_size: int, special_ids: Mapping[str, int]) -> Any:
    from hfscratch.planning.shape import build_config

    model: ModelSection = recipe.sections.get("model") or ModelSection()
    return build_config(
        model.type,
        depth=model.depth,
        fields=model.fields,
        vocab_size=vocab_size,
        special_ids=special_ids,
        sequence_length=recipe.section("pretrain").sequence_length,
    )


def _model_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(f"model.type is '{config.model_type}', which has no causal language model in transformers")
    return AutoModelForCausalLM


def _looks_ahead(model: Any, input_ids: Any) -> float:
    """How far the logits of a row's first half move when its second half changes: 0 for a causal model."""
    half = input_ids.shape[1] // 2
    changed = input_ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % model.config.vocab_size
    return (_logits(model, changed)[:, :half] - _logits(model, input_ids)[:, :half]).abs().max().item()


def _require_usable(model_class: Any, config: Any, section: PretrainSection) -> None:
    """Builds the model and lets it read a row, before any stage works; a large one without its weights.

    Raises: UsageError if that fails, if it sees tokens before it predicts them, or if documents that are to be
    isolated see each other.
    """
    import torch

    kind = config.model_type
    longest = getattr(config, "max_position_embeddings", None) or section.sequence_length
    if longest < section.sequence_length:
        raise UsageError(
            f"pretrain.sequence_length is {section.sequence_length}, and the model reads at most {longest} tokens "
            "(max_position_embeddings); shorten the rows or lengthen the model's context"
        )
    length = min(section.sequence_length, PROBED_TOKENS)
    is_small = config.hidden_size * config.num_hidden_layers <= PROBED_WIDTHS
    ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    half = length // 2
    positions = torch.cat([torch.arange(half), torch.arange(length - half)])[None]
    try:
        with torch.device("cpu" if is_small else "meta"):
            model = model_class.from_config(copy.deepcopy(config)).eval()
        if not is_small:
            model(input_ids=ids.to("meta"), labels=ids.to("meta"), use_cache=False)
            return
        ahead = _looks_ahead(model, ids)
        leak = 0.0
        if section.isolate_documents:
            other = ids.clone()
            other[:, :half] = (other[:, :half] + 1) % config.vocab_size
            with torch.no_grad():
                one, two = (model(input_ids=x, position_ids=positions, use_cache=False).logits for x in (ids, other))
            leak = (one - two)[:, half:].abs().max().item()
    except Exception as error:  # whatever foreign modeling code raises on values that do not fit it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"model.type is '{kind}', which cannot be built and read a row of {length} tokens: {reason}"
        ) from error
    if not ahead <= 1e-4:
        raise UsageError(f"model.type is '{kind}', which sees the tokens that it is to predict; take a causal type")
    if not leak <= 1e-4:
        raise UsageError(
            f"model.type is '{kind}', whose documents see each other when they share a row; set "
            "pretrain.isolate_documents=false, or take another type"
        )


def _training_arguments(
    section: PretrainSection,
    folder: Path,
    seed: int,
    *,
    max_steps: int,
    rates: Any,
    has_validation: bool,
    chosen: Any = None,
    micro_rows: int = 1,
    accumulation: int = 1,
    compile_model: bool = False,
) -> Any:
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
    given = section.arguments
    values |= {name: value for name, value in given.items() if name != "num_train_epochs"}
    if not has_validation:
        values["eval_strategy"] = "no"
    values["max_steps"] = max_steps
    is_validated = values["eval_strategy"] != "no"
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
        "bf16": bool(chosen and chosen.name == "bf16"),
        "fp16": bool(chosen and chosen.name == "fp16"),
        "per_device_train_batch_size": micro_rows,
        "per_device_eval_batch_size": max(micro_rows, 1),
        "gradient_accumulation_steps": accumulation,
        "torch_compile": compile_model,
        "train_sampling_strategy": "sequential",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
    }
    if rates is not None:
        values["learning_rate"] = rates.matrix
    with as_usage_errors("pretrain"):
        return TrainingArguments(**values)


def _budget(section: PretrainSection, num_parameters: int, corpus_tokens: int, rows_per_epoch: int) -> _Budget:
    length = section.sequence_length
    from hfscratch.training.batch import default_batch_tokens

    if "num_train_epochs" in section.arguments:
        tokens = int(section.arguments["num_train_epochs"] * rows_per_epoch * length)
    elif section.max_tokens is not None:
        tokens = section.max_tokens
    else:
        tokens = min(DEFAULT_TOKENS_PER_PARAMETER * num_parameters, int(section.max_epochs * corpus_tokens))
    batch_tokens = section.batch_tokens or default_batch_tokens(tokens, length)
    steps = section.arguments.get("max_steps") or max(1, tokens // batch_tokens)
    return _Budget(rows_per_step=batch_tokens // length, max_steps=steps, sequence_length=length)


def _rates(section: PretrainSection, config: Any) -> Any:
    from hfscratch.training.optimizer import default_learning_rates

    rates = default_learning_rates(config.hidden_size, section.arguments.get("learning_rate"))
    given = {name: value for name, value in to_dict(section.learning_rates).items() if value is not None}
    return dataclasses.replace(rates, **given)


def _compile_reason(section: PretrainSection, seconds: float | None) -> tuple[bool, str]:
    """Whether to compile the model, and why, in words."""
    if "torch_compile" in section.arguments:
        return bool(section.arguments["torch_compile"]), "as the recipe says"
    if seconds is None or seconds < 60 * COMPILE_PAYS_AFTER_MINUTES:
        return False, "no: the run is too short to earn a minute or two of compiling back"
    import torch

    if not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "clang++"))):
        return False, "no: there is no C++ compiler"
    return True, "yes: the run is long enough to earn it back"


def _num_parameters(model: Any) -> int:
    """Parameters of a model that ZeRO-3 has partitioned; 0 for any other."""
    return sum(getattr(parameter, "ds_numel", 0) for parameter in model.parameters())


def _shape(config: Any) -> str:
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{getattr(config, 'num_attention_heads', 'no')} heads, vocabulary {config.vocab_size:,}"
    )


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _logits(model: Any, input_ids: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=input_ids).logits.float().cpu()  # (1, seq, vocab)


def _reload_proof(folder: Path, input_ids: Any, reference: Any, model: Any) -> Proof:
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=model.dtype, use_safetensors=True)
    reloaded.to(model.device)
    difference = (_logits(reloaded, input_ids.to(model.device)) - reference).abs().max().item()
    return Proof(
        "the published folder reloads to the trained model's logits",
        difference <= 1e-4 * max(1.0, reference.abs().max().item()),
        f"max |Δlogit| {difference:.1e} over {input_ids.shape[1]} tokens",
    )


def _history(log: list[dict[str, Any]], tokens_per_step: int, progress: Any) -> tuple[list[Any], list[Any]]:
    """The Trainer's log as `(history, samples)`: a row a logged step, with tokens and bits per byte."""
    rows: dict[int, dict[str, Any]] = {}
    samples = []
    for entry in log:
        if "sample" in entry:
            samples.append({"step": entry["step"], "text": entry["sample"]})
            continue
        row = rows.setdefault(entry["step"], {"step": entry["step"], "tokens": entry["step"] * tokens_per_step})
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "seconds"):
            if name in entry:
                row[name] = entry[name]
        if "loss" in entry:
            row["bits_per_byte"] = progress.to_bits_per_byte(entry["loss"])
        if "eval_loss" in entry:
            row["eval_bits_per_byte"] = progress.eval_bits_per_byte(entry["eval_loss"])
    return [rows[step] for step in sorted(rows) if len(rows[step]) > 2], samples
