"""pretrain: trains a causal or a masked language model, from random weights or from a checkpoint's, on token ids.

The order of rows is an index over document lengths (`tokens.packing`), source by source (`tokens.mixture`); how many of
them a step reads is arithmetic (`planning.curriculum`). The loop is `transformers.Trainer` with our mixin
(`training.trainer`). Interrupted, the same command goes on from the last checkpoint under `.work/pretrain/`.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Workspace
from hfscratch.errors import MachineError, UsageError
from hfscratch.planning.curriculum import (
    Curriculum,
    Phase,
    Portion,
    describe,
    in_words,
    plan_steps,
    require_rows_for,
    require_sources,
    rows_of_phases,
)
from hfscratch.recipe import Recipe, open_field, to_dict
from hfscratch.training.arguments import (
    MUON,
    NUM_EVALUATIONS,
    UNKEYED,
    argument_names,
    as_usage_errors,
    pretrain_arguments,
    refused,
)

logger = logging.getLogger(__name__)

INPUTS = ("tokenizer",)
VERSION = 1
CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""What is read of a checkpoint beside its weights."""
MAY_CHANGE = ("max_position_embeddings", "rope_parameters", "rope_theta")
"""Fields of a checkpoint's config that a recipe may set otherwise, beside those of dropout: its context."""

CONTINUED_RATE = 0.1
"""Of a checkpoint, against the rate of matrices from random weights. Measured on a Llama of 260 thousand parameters
that writes stories: 120 thousand tokens of old books took it from 3.65 to 2.94 nats a token, and on text of its own
kind, where there was nothing to learn, it lost 0.02. At 1.0 it came to 2.77, but lost 0.16. A warmup changed nothing.
"""
MAX_EVAL_TOKENS = 32768
NO_TOKEN = -1
"""An id that no token has."""


def _model_names(values: Mapping[str, Any]) -> Mapping[str, str]:
    from hfscratch.planning.shape import OURS as FROM_TOKENIZER
    from hfscratch.planning.shape import config_fields

    fields = config_fields(values.get("type", "scratch"))
    return {name: kind for name, kind in fields.items() if name not in FROM_TOKENIZER}


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What the model is: a type, a depth, and any field of that type's own configuration."""

    type: str = "scratch"
    """`scratch` (our architecture) or any type of transformers that has a model for pretrain.objective: causal (llama,
    qwen3, gpt2, …) or masked (modernbert, bert, …)."""

    depth: int | None = None
    """The one dial: layers; the width is 64 a layer and heads are 64 wide. Learning rates, the tokens to train on and
    those of a step follow, where `pretrain` does not give them (docs/dial.md). 4 if no shape is given at all."""

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
    """The word embeddings; tables of value embeddings learn at half of it, embeddings that are scaled (Gemma's) at so
    much less."""
    head: float | None = None
    """The output matrix, also where it is the word embeddings too."""
    rest: float | None = None
    """Norms, biases, scalars."""

    def __post_init__(self) -> None:
        for name, value in to_dict(self).items():
            _require_positive(f"learning_rates.{name}", value)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What objective mlm hides, drawn anew in every epoch; the validation split is always masked alike."""

    probability: float = 0.3
    """Share of the tokens that are to be guessed."""
    unit: Literal["token", "word", "span"] = "token"
    """What is hidden as a whole: single tokens, whole words, or spans of words. Words are cut as GPT-2 cuts them."""
    span_length: float = 3.0
    """Words in a span on average (geometric); for unit span alone."""
    mask_share: float = 0.8
    """Of what is to be guessed, the share that stands behind the mask token."""
    random_share: float = 0.1
    """The share that random tokens take the place of; what is left of 1 stays as it is."""

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise UsageError(f"masking.probability is {self.probability}; it must be above 0 and below 1")
        shares = {"mask_share": self.mask_share, "random_share": self.random_share}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise UsageError(f"masking.{name} is {value}; it must be from 0 to 1")
        if not 0 < sum(shares.values()) <= 1 + 1e-9:
            raise UsageError(
                f"masking: mask_share ({self.mask_share}) and random_share ({self.random_share}) are "
                f"{sum(shares.values()):g} together; that must be above 0, and 1 at most"
            )
        shortest = 1 / (1 - self.probability)
        if self.unit == "span" and not self.span_length >= shortest:
            raise UsageError(
                f"masking.span_length is {self.span_length}; where {self.probability:g} of all words are hidden, those "
                f"that touch make runs of {shortest:.3g} words on average: set it to that or more"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainSection:
    """How the model is trained: what the batch is, never on what hardware. Any field of transformers'
    TrainingArguments may stand here too."""

    objective: Literal["clm", "mlm"] = "clm"
    """What is learnt. clm, causal language modelling: each token is predicted from those before it. mlm, masked
    language modelling: some tokens are hidden and guessed from all others, which makes an encoder, to be finetuned as a
    classifier; the tokenizer gets a mask token."""

    masking: Masking = Masking()
    """What mlm hides."""

    fim_rate: float = 0.0
    """For clm: the share of the pieces of documents that are rearranged as prefix, suffix, middle, by which the model
    learns to fill in (half of them begin with the suffix); 0.5 is usual for code, 0 is none. The tokenizer gets
    <|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>; in a full row they take the place of the last tokens, and how
    many those are is told before training."""

    sequence_length: int = 256
    """Tokens in a row, the longest context that the model is trained on."""

    batch_tokens: int | None = None
    """Tokens an optimizer step, over all processes together; derived from the token budget if not given."""

    mixture: dict[str, Portion] | None = None
    """How much is read of each source (its `name` in `data.sources`, or what the dataset card calls it): a `weight`
    (its share of the tokens), `epochs` (how often it is read), or both (then epochs are the most). What is not named is
    not read. Without a mixture, all documents are read as they are."""

    phases: tuple[Phase, ...] = ()
    """How the run ends: each phase has a `share` of the tokens, and a `mixture` or a `sequence_length` of its own (an
    anneal on the best sources, longer rows). It keeps what it does not set from what came before it."""

    batch_ramp: float | None = None
    """Over this share of the tokens the batch grows: an eighth of `batch_tokens`, a quarter, a half, in whole rows. The
    learning rate follows the steps, of which there are then more."""

    init_from: str | None = None
    """Start from this checkpoint's weights instead of random ones: a model folder, a run folder, or a name on the Hub.
    Its config decides the shape; `model` may change its dropout and its context. Its tokens are needed: tokenizer.from.
    """

    max_tokens: int | None = None
    """Tokens to train on, repeats counted; `tokens_per_parameter` if not given, but at most `max_epochs` of the corpus.
    """

    tokens_per_parameter: float = 20.0
    """Where `max_tokens` is derived, tokens for each parameter of the model, embeddings counted. About 20 make the best
    model of a given compute; a smaller model that is to be used much is worth more of them."""

    max_epochs: float = 8.0
    """Where `max_tokens` is derived, the most often that the corpus is read."""

    packing: Literal["concat", "best_fit", "single"] = "concat"
    """How documents fill rows. concat: end to end, cut where a row ends; what is left of an epoch, less than a row, is
    left out. best_fit: only those longer than a row are cut, and the others put together so that little is padded.
    single: rows of its own for every document, the rest padded. With these two no token is left out, but for fim_rate.
    """

    isolate_documents: bool = True
    """Whether a token sees only its own document, when several share a row."""

    learning_rates: RoleRates = RoleRates()
    """Peak learning rates by role. `learning_rate` (of the matrices) scales all that are not given here. From a
    checkpoint (`init_from`) all roles have one rate, a tenth of the matrices' from random weights: what is learnt
    already is to be moved, not replaced."""

    early_stopping_patience: int | None = 3
    """Stop after this many validations without improvement; the best checkpoint is what is published."""

    eval_tokens: int | None = None
    """Validation tokens read at each validation while training (`evaluate` reads them all); a 40th of the training
    tokens if not given, 32768 at most."""

    resume: Literal["auto", "changed", "anew"] = "auto"
    """What is done after an interruption. auto: go on from the last checkpoint, if nothing that affects the result has
    changed since. changed: even then. anew: begin again."""

    watchdog_seconds: float = 600.0
    """Of several processes, one that gives no sign of life for so long, or falls behind the others for so long, is
    named, and the run is ended, so that it can be started again."""

    spikes: int | None = 5
    """At a loss that is far outside its recent spread, or not finite, training goes back to the last checkpoint and on
    without the rows of that step; after so many of them it gives up. null to look for none."""

    sample_prompt: str = ""
    """What the sample generated at each validation begins with."""

    sample_tokens: int = 48
    """Tokens of that sample; 0 for none."""

    arguments: dict[str, Any] = open_field(lambda values: argument_names(), refused("pretrain.batch_tokens"))

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_tokens", "max_tokens", "tokens_per_parameter", "max_epochs"):
            _require_positive(name, getattr(self, name))
        for name in ("eval_tokens", "watchdog_seconds"):
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
        self._check_curriculum()
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise UsageError(
                f"early_stopping_patience is {self.early_stopping_patience}; it must be at least 1, or null"
            )
        if self.spikes is not None and self.spikes < 1:
            raise UsageError(f"spikes is {self.spikes}; it must be at least 1, or null to look for none")
        if self.sample_tokens < 0:
            raise UsageError(f"sample_tokens is {self.sample_tokens}; it must not be negative")
        if not 0 <= self.fim_rate <= 1:
            raise UsageError(f"fim_rate is {self.fim_rate}; it must be from 0 (none) to 1 (all)")
        if self.objective == "mlm" and self.fim_rate:
            raise UsageError(f"fim_rate is {self.fim_rate}, for causal models, and objective is mlm; leave it out")
        if self.objective == "mlm" and self.sample_prompt:
            raise UsageError("sample_prompt is for models that write, and objective is mlm; leave it out")
        if self.objective == "clm" and self.masking != Masking():
            raise UsageError("masking is for objective mlm, and objective is clm; leave it out, or set objective: mlm")

    @property
    def is_masked(self) -> bool:
        """Whether tokens are hidden and guessed from both sides."""
        return self.objective == "mlm"

    def _check_curriculum(self) -> None:
        if self.mixture is not None and not self.mixture:
            raise UsageError("mixture names no source; leave it out to read all documents")
        ending = sum(Fraction(str(each.share)) for each in self.phases)
        if ending >= 1:
            raise UsageError(
                f"the phases have {float(ending):g} of the tokens together, and the run begins before the first; their "
                "shares must be below 1"
            )
        if self.batch_ramp is not None and not 0 < self.batch_ramp < 1 - ending:
            before = (
                f", and below {float(1 - ending):g}, where the first phase begins" if self.phases else " and below 1"
            )
            raise UsageError(f"batch_ramp is {self.batch_ramp}; it must be above 0{before}")
        for length in self.row_lengths:
            if (self.batch_tokens or self.longest) % length:
                whose = f"batch_tokens is {self.batch_tokens}" if self.batch_tokens else f"phases have {self.longest}"
                raise UsageError(
                    f"{whose}, which rows of {length} tokens do not divide; a step has as many tokens in every phase: "
                    "make one a multiple of the other"
                )

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens in a row, of the run as it begins and of each phase."""
        lengths = [self.sequence_length]
        for each in self.phases:
            lengths.append(each.sequence_length or lengths[-1])
        return tuple(lengths)

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(self.row_lengths)

    @property
    def mixtures(self) -> tuple[dict[str, Portion] | None, ...]:
        """What the run as it begins, and what each phase says of sources."""
        return self.mixture, *(each.mixture for each in self.phases)


SECTIONS = {"model": ModelSection, "pretrain": PretrainSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of both sections that change the result."""
    pretrain = to_dict(recipe.section("pretrain"))
    model = to_dict(recipe.sections.get("model") or ModelSection())
    unkeyed = UNKEYED | {"resume", "watchdog_seconds"}
    return {"model": model, "pretrain": {name: value for name, value in pretrain.items() if name not in unkeyed}}


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """The digest of the checkpoint's files, if there is one; unchanged files are not read again."""
    section: PretrainSection = recipe.section("pretrain")
    if section.init_from is None:
        return {}
    from hfscratch import serving
    from hfscratch.data import sources

    folder = serving.cached_copy(section.init_from)
    if folder is None:  # gone since, or never there
        return {"init_from": _started_from(recipe) or "missing"}
    found = sorted(path for path in folder.glob("*") if path.suffix == ".safetensors" or path.name in CONFIG_FILES)
    stats = [(path.name, path.stat()) for path in found]
    held = tuple(sources.SourceFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    source = sources.FoundSource(0, "init_from", folder, held, {}, None, None, "")
    digests = sources.digests([source], workspace.work / "digests.json")
    return {"init_from": artifact.digest_json(sorted(digests.items()))}


def _started_from(recipe: Recipe) -> str | None:
    """The digest of the checkpoint that the published model started from, if it is the one that the recipe names."""
    manifest = artifact.read_manifest(recipe.out / "pretrain") or {}
    started = manifest.get("metrics", {}).get("init_from", {})
    return started.get("digest") if started.get("model") == recipe.section("pretrain").init_from else None


def check(recipe: Recipe) -> None:
    """Checks what needs transformers, before any stage works: the configuration, a checkpoint that training starts
    from and its tokens, and the trainer's arguments."""
    from hfscratch import serving
    from hfscratch.tokens.tokenizer import FIM_TOKENS, num_ids, open_tokenizer
    from hfscratch.training import engines
    from hfscratch.training.optimizer import muon_settings, require_deepspeeds
    from hfscratch.training.sight import require_usable

    engines.require_launch()
    section: PretrainSection = recipe.section("pretrain")
    data = recipe.sections.get("data")
    names = [each.name for each in data.sources] if data else []
    if names and all(names) and len(set(names)) == len(names):  # otherwise the data stage makes some up
        require_sources(section.mixtures, names)
    tokenizer = recipe.sections.get("tokenizer")
    ids = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    vocab_size = (tokenizer and tokenizer.vocab_size) or 4096
    taken = None
    if tokenizer and tokenizer.from_ is not None:
        published = recipe.out / "tokenizer"
        taken, _ = open_tokenizer(serving.local_copy(tokenizer.from_, weights=False, otherwise=published))
        vocab_size, ids = num_ids(taken), {name: getattr(taken, name) for name in ids}
    _require_objective_tokens(recipe)
    if section.init_from is None:
        config = _config(recipe, vocab_size=vocab_size, special_ids=ids)
    elif serving.cached_copy(section.init_from) is None and _started_from(recipe):
        # The checkpoint is gone, and may not be needed again.
        config = serving.load_config(recipe.out / "pretrain", masked=section.is_masked)
    else:
        folder = _checkpoint(recipe)
        config = _checkpoint_config(recipe, folder)
        if taken is None and (recipe.out / "tokenizer" / "tokenizer.json").is_file():
            taken, _ = open_tokenizer(recipe.out / "tokenizer")
        if taken is not None:
            _require_its_tokens(section.init_from, folder, config, taken)
            if section.fim_rate and not taken.get_vocab().keys() >= set(FIM_TOKENS):
                raise UsageError(
                    f"pretrain.init_from is {section.init_from}, which was trained without {', '.join(FIM_TOKENS)}; "
                    "leave pretrain.fim_rate out"
                )
        elif tokenizer:
            raise UsageError(
                f"pretrain.init_from is {section.init_from}, which knows its own tokens only, and the recipe trains a "
                f"tokenizer; set tokenizer.from={section.init_from} and leave out what says how to train one"
            )
        else:
            raise UsageError(
                f"pretrain.init_from is {section.init_from}, whose tokenizer is needed too, and there is none in "
                f"{recipe.out / 'tokenizer'}; add tokenizer.from={section.init_from}"
            )
        serving.load_weights(folder, copy.deepcopy(config), masked=section.is_masked, device_map="meta")
    require_usable(
        _model_class(config, section),
        config,
        sequence_length=section.sequence_length,
        longest=section.longest,
        isolate_documents=section.isolate_documents,
        masked=section.is_masked,
    )
    arguments = pretrain_arguments(
        section.arguments,
        Path("unused"),
        recipe.seed,
        max_steps=10**6,
        has_validation=True,
        is_continued=section.init_from is not None,
        tells_predictions=section.is_masked,
    )
    with as_usage_errors("pretrain"):
        from transformers import Trainer
        from transformers.integrations import get_reporting_integration_callbacks

        get_reporting_integration_callbacks(arguments.report_to)
        if section.arguments.get("optim") == MUON:
            muon_settings(arguments.optim_args)
            if (engine := engines.name_of(arguments)).startswith("zero"):
                require_deepspeeds(section.arguments, engine)
        Trainer.get_optimizer_cls_and_kwargs(arguments)


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Trains, proves that the published folder reloads to the same logits, publishes."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    from hfscratch import serving, tokens
    from hfscratch.planning.shape import count_parameters, training_flops_per_token
    from hfscratch.tokens import objectives
    from hfscratch.tokens.tokenizer import num_ids
    from hfscratch.training import (
        attention,
        batch,
        callbacks,
        checkpoints,
        engines,
        guard,
        loss,
        masked,
        precision,
        processes,
        watching,
    )
    from hfscratch.training.optimizer import parameter_groups
    from hfscratch.training.sight import logits_of, reach, reload_proof, sight_proof
    from hfscratch.training.trainer import PretrainTrainer, open_run, train_through_spikes

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
    sources = tokens.Sources(train_split, packing=section.packing, seed=recipe.seed)
    require_sources(section.mixtures, train_split.source_names)
    an_epoch = section.sequence_length * sources.rows_per_epoch(tokens.ALL, section.sequence_length)
    has_validation = "validation" in tokens.splits_in(tokenizer_folder / "tokens")

    chosen = precision.choose_precision()  # before TrainingArguments writes its own choice into the environment
    special_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    start = None
    if section.init_from is None:
        config = _config(recipe, vocab_size=num_ids(tokenizer), special_ids=special_ids)
    else:
        start = _checkpoint(recipe)
        config = _checkpoint_config(recipe, start)
        _require_its_tokens(section.init_from, start, config, tokenizer)
        _take_special_ids(config, special_ids)
    model_class = _model_class(config, section)
    with torch.device("meta"):
        empty = model_class.from_config(copy.deepcopy(config))
    flops = {length: training_flops_per_token(empty, length) for length in section.row_lengths}

    # ZeRO-3 partitions a model while it is made, and learns of that from TrainingArguments: hence these come first.
    make_arguments = functools.partial(
        pretrain_arguments,
        section.arguments,
        workspace.work / workspace.key[:16],
        recipe.seed,
        has_validation=has_validation,
        is_continued=start is not None,
        tells_predictions=section.is_masked,
    )
    arguments = make_arguments(max_steps=1)
    # What a process measures for itself, the first measures for all.
    if not processes.broadcast(workspace.is_stale, world_size):
        return []
    chosen = processes.broadcast(chosen, world_size)
    training = open_run(
        workspace,
        arguments,
        section="pretrain",
        resume=section.resume,
        precision=chosen,
        guard=guard.Guard(looks_at_losses=section.spikes is not None),
        watchdog_seconds=section.watchdog_seconds,
    )
    is_muon = section.arguments.get("optim") == MUON
    checkpoint_folder, earlier = training.folder, training.earlier
    chosen = precision.as_before(chosen, training.facts["precision"])
    transformers.set_seed(recipe.seed)
    if start is None:
        model = engines.random_weights(model_class, config)
    else:
        model = serving.load_weights(start, config, masked=section.is_masked, dtype=torch.float32)
        if not section.is_masked:
            _take_special_ids(model.generation_config, special_ids)
    num_parameters = engines.num_partitioned(model) or count_parameters(model)
    curriculum = _curriculum(section, num_parameters, sources)
    require_rows_for(world_size, curriculum)
    full = curriculum.of_phase(0)[-1]
    is_smoothed = bool(section.arguments.get("label_smoothing_factor"))
    is_large = config.vocab_size >= loss.LARGE_VOCABULARY
    chunks_loss = is_large and not (is_smoothed or section.is_masked) and loss.can_chunk(model)
    recomputes = any(section.arguments.get(f"{name}_checkpointing") for name in ("activation", "gradient"))
    token_bytes = batch.activation_bytes_per_token(config, chunks_loss=chunks_loss, recomputes=recomputes)
    kinds = [(each.rows_per_step, each.sequence_length) for each in curriculum.stretches]
    pieces = earlier.get("pieces")
    if not pieces or pieces * world_size > min(rows for rows, _ in kinds):  # the recipe may have changed since
        pieces = processes.broadcast(batch.num_pieces(kinds, world_size, token_bytes), world_size)
    held = [-(-each.rows_per_step // (pieces * world_size)) for each in curriculum.stretches]  # rows at a time
    micro_rows = held[curriculum.stretches.index(full)]
    rates = _rates(section, config)
    attending = attention.choose_attention(model, section.longest, isolate_documents=section.isolate_documents)
    if attending.name == attention.NAME:
        model.set_attn_implementation(attending.name)

    # Where one token both ends a text and begins the next, it is the collator that knows the two apart.
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id == tokenizer.bos_token_id else None
    begins = tokenizer.bos_token_id if separator is None else NO_TOKEN
    collate: Callable[[Any], dict[str, Any]] = tokens.collate
    if section.is_masked and section.isolate_documents and config.model_type != "scratch":
        collate = masked.IsolatingCollator(model.config, tokens.collate)
    elif separator is not None and not section.is_masked:
        collate = functools.partial(_collate_separated, separator=separator)
    make_rows = functools.partial(
        tokens.PackedRows,
        bos_token_id=begins,
        pad_token_id=tokenizer.pad_token_id,
        isolate_documents=section.isolate_documents,
    )
    counts = rows_of_phases(section.mixtures, curriculum, sources.rows_per_epoch)
    mixtures = [sources.deal(each, length) for each, length in zip(counts, section.row_lengths, strict=True)]
    masking: dict[str, Any] = {
        "seed": recipe.seed,
        "marks_padding": section.packing != "concat" and not section.isolate_documents,
        **to_dict(section.masking),
    }

    def to_learn(rows: tokens.PackedRows) -> Any:
        if section.is_masked:
            return objectives.MaskedRows(rows, tokenizer, **masking)
        if section.fim_rate:
            return objectives.InfillingRows(rows, tokenizer, seed=recipe.seed, rate=section.fim_rate)
        return rows

    train_rows = [
        to_learn(make_rows(train_split, index, num_rows=curriculum.rows_of(phase)))
        for phase, index in enumerate(mixtures)
    ]
    batches = tokens.Batches(
        train_rows,
        rows_of_step=curriculum.rows_of_step,
        num_steps=curriculum.max_steps,
        items_per_step=pieces * world_size,
    )
    bytes_per_token = [sources.bytes_per_token(each) for each in counts]
    told = describe(curriculum, counts, sources.rows_per_epoch)
    held_out = None
    validation_rows: Any = None
    eval_tokens = section.eval_tokens or min(MAX_EVAL_TOKENS, curriculum.tokens // 40)
    if has_validation:
        validation_split = tokens.TokenizedSplit(tokenizer_folder / "tokens", "validation")
        held_out = tokens.hold_out(
            tokens.Sources(validation_split, packing=section.packing, seed=recipe.seed),
            make_rows,
            sequence_length=section.sequence_length,
            num_tokens=eval_tokens,
            world_size=world_size,
            is_even=any(section.mixtures),
        )
        validation_rows = held_out.rows
        if section.is_masked:
            validation_rows = objectives.MaskedRows(validation_rows, tokenizer, **masking)

    seconds = None
    if world_size == 1:
        if torch.cuda.is_available():
            model.to("cuda")
        sample = collate([train_rows[0][row] for row in range(micro_rows)])
        with loss.chunked(model) if chunks_loss else contextlib.nullcontext():
            per_micro = batch.seconds_per_step(model, sample, bf16=chosen.is_bf16)
        second_per_flop = per_micro / (micro_rows * full.sequence_length * flops[full.sequence_length])
        seconds = sum(
            batch.training_seconds(each.num_steps, each.batch_tokens * flops[each.sequence_length] * second_per_flop)
            for each in curriculum.stretches
        ) + batch.training_seconds(
            0,
            per_micro,
            evaluation_tokens=len(validation_rows or ()) * full.sequence_length * NUM_EVALUATIONS,
            tokens_per_step=micro_rows * full.sequence_length,
        )
    compiled = batch.compile_reason(seconds)
    if "torch_compile" in section.arguments:
        compiled = bool(section.arguments["torch_compile"]), "as the recipe says"
    if "compiled" in earlier:
        compiled = earlier["compiled"], "as before the interruption"
    training.facts |= {"pieces": pieces, "compiled": compiled[0]}
    arguments = make_arguments(
        max_steps=curriculum.max_steps,
        learning_rate=rates.matrix,
        precision=chosen.name,
        # Batches that are all full: accelerate would fill up the last ones with rows that were counted before.
        eval_rows=_largest_divisor(len(validation_rows or ()) // world_size, micro_rows),
        accumulation=pieces,
        compile_model=compiled[0],
    )
    model_bytes = batch.training_state_bytes(num_parameters)
    largest = max(rows * each.sequence_length for rows, each in zip(held, curriculum.stretches, strict=True))
    activations = largest * token_bytes
    epochs = curriculum.tokens / an_epoch
    total_flops = sum(
        flops[length] * each for length, each in curriculum.tokens_by_length(curriculum.max_steps).items()
    )
    utilization = mixtures[0].utilization
    growing = f"{curriculum.stretches[0].batch_tokens:,} to " if section.batch_ramp else ""
    plan = [
        ("model", f"{_shape(config)}, {num_parameters / 1e6:.2f} M parameters"),
        (
            "tokens",
            f"{curriculum.tokens:,} ({epochs:.2g} times the train split) in {curriculum.max_steps:,} steps of "
            f"{growing}{full.batch_tokens:,} ({world_size} process{'es' if world_size > 1 else ''} × {micro_rows} rows "
            f"× {pieces} accumulated)",
        ),
        *in_words(told),
        *(
            [("packing", f"{section.packing}: {utilization:.1%} of a row is text, the rest padding")]
            if section.packing != "concat"
            else []
        ),
        *_objective_in_words(section, train_rows[0]),
        ("precision", f"{chosen.name}, because {chosen.reason}"),
        ("attention", f"{attending.name}, because {attending.reason}"),
        ("compiled", compiled[1]),
        (
            "memory",
            f"about {(model_bytes + activations) / 1e9:.2f} GB more than now ({model_bytes / 1e9:.2f} model and "
            f"optimizer, {activations / 1e9:.2f} activations) of {batch.free_memory_bytes() / 1e9:.1f} GB free",
        ),
        (
            "time",
            f"about {_minutes(seconds)} ({curriculum.tokens / seconds:,.0f} tokens/s, measured on this batch)"
            if seconds
            else "shown by the progress bar after the first steps",
        ),
    ]
    if is_muon:
        groups = [group for group in parameter_groups(model, rates, weight_decay=0.0, muon=True) if group.get("muon")]
        matrices = [getattr(each, "ds_numel", each.numel()) for group in groups for each in group["params"]]
        whose = "DeepSpeed's muon" if training.facts["engine"].startswith("zero") else "muon"
        words = f"{whose} for {len(matrices)} matrices of {sum(matrices) / 1e6:.2f} M parameters, AdamW for the others"
        plan.insert(2, ("optimizer", words))
    if start is not None:
        plan.insert(0, ("start", f"{section.init_from} ({source_digests(recipe, workspace)['init_from'][:12]})"))
    if chunks_loss:
        words = f"in chunks of {loss.chunk_tokens(config.vocab_size):,} tokens, because the vocabulary is large"
        plan.insert(-4, ("loss", words))
    a_token = total_flops / curriculum.tokens
    plan.insert(-5, ("compute", f"{total_flops / 1e12:,.1f} TFLOP, {a_token / 1e6:,.1f} MFLOP a token"))
    if rank == 0:
        logger.info("pretrain will train:\n%s", "\n".join(f"  {label:<10} {value}" for label, value in plan))
    if model_bytes + activations > batch.free_memory_bytes() and world_size == 1:
        raise MachineError(
            f"training {num_parameters / 1e6:.0f} M parameters needs about {(model_bytes + activations) / 1e9:.1f} GB, "
            f"and {batch.free_memory_bytes() / 1e9:.1f} GB are free; set a smaller model.depth"
        )

    if rank == 0:
        artifact.require_free_space(checkpoint_folder, 4 * model_bytes)
    watch = watching.Watch(
        checkpoint_folder,
        tokens_at=curriculum.tokens_at,
        flops_at=lambda steps: sum(flops[length] * each for length, each in curriculum.tokens_by_length(steps).items()),
        bytes_per_token=None
        if section.is_masked
        else lambda step: bytes_per_token[curriculum.locate(max(0, step - 1))[0].phase],
        eval_bytes_per_token=held_out.bytes_per_token if held_out else None,
        source_bytes_per_token=held_out.source_bytes_per_token if held_out else None,
        matrix_rate=precision.matrix_rate(chosen.name, world_size),
    )
    trainer_callbacks: list[Any] = [training.guard, callbacks.ProgressBar("pretrain")]
    if has_validation and section.sample_tokens and section.is_masked:
        show = functools.partial(objectives.filled_in, tokenizer)
        trainer_callbacks.append(masked.Fillings(validation_rows[0], collate, show, section.sample_tokens))
    elif has_validation and section.sample_tokens:
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
            data_collator=collate,
            train_dataset=batches,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
            callbacks=[*trainer_callbacks, watch],
            **(masked.trainer_arguments(arguments.label_smoothing_factor) if section.is_masked else {}),
        )
    name = f"pretrain-{workspace.key[:8]}"
    watching.keep_trackers(trainer, workspace.out / "logs" / "pretrain", project=recipe.name, name=name)
    trainer.learning_rates = rates
    trainer.uses_muon = is_muon
    trainer.chunks_loss = chunks_loss
    trainer.run = training
    if held_out is not None:
        trainer.source_names, trainer.source_shares = held_out.source_names, held_out.source_shares
    training.guard.phases = frozenset(curriculum.first_step_of(phase) + 1 for phase in range(1, len(counts)))
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(recipe.seed + rank)  # each process drops out other values

    before_training = time.perf_counter() - started
    spikes = train_through_spikes(trainer, batches, limit=section.spikes, section="pretrain")

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.config.use_cache = True  # the Trainer switched it off for training; a user wants it
    probe = collate([train_rows[0][0]])["input_ids"]
    reference = logits_of(model, probe.to(arguments.device))
    seen = reach(model, probe.to(arguments.device))
    staging: Any = workspace.staging() if rank == 0 else contextlib.nullcontext(workspace.work / "staging")
    with staging as folder:
        processes.wait_for_everyone(world_size)
        engines.save_trained_model(trainer, Path(folder))
        engines.leave()
        processes.wait_for_everyone(world_size)
        if rank == 0:
            figure = "loss" if section.is_masked else "bits_per_byte"
            history, samples = watching.curve(trainer.state.log_history, tokens_at=curriculum.tokens_at)
            loads_best = arguments.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
            published_step = trainer.state.best_global_step if loads_best else trainer.state.global_step
            train_tokens = curriculum.tokens_at(trainer.state.global_step)
            train_seconds = max((each.get("seconds", 0.0) for each in trainer.state.log_history), default=0.0)
            metrics = {
                "parameters": num_parameters,
                "train_tokens": train_tokens,
                "steps": trainer.state.global_step,
                "published_step": published_step,
                "tokens_per_s": train_tokens / max(train_seconds, 1e-9),
                "train_seconds": train_seconds,
                "precision": chosen.name,
                "attention": attending.name,
                "objective": section.objective,
                "packing": section.packing,
                "utilization": utilization,
                "phases": told,
                "processes": world_size,
                "engine": training.facts["engine"],
                "learning_rates": dataclasses.asdict(rates),
                "predicted_seconds": seconds,
                "state": checkpoints.state_digests(checkpoint_folder),
                "spikes": spikes,
                "watched": watch.summary(history),
            }
            if start is not None:
                metrics["init_from"] = {
                    "model": section.init_from,
                    "digest": source_digests(recipe, workspace)["init_from"],
                    f"eval_{figure}": _at_start(history, f"eval_{figure}"),
                }
            tokenizer.model_max_length = (start and serving.context_of(config)) or section.longest
            tokens.save_tokenizer(tokenizer, folder)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same in plain text
            artifact.write_json(
                folder / "metrics.json",
                {"history": history, "samples": samples, "plan": plan, "resumes": watch.resumes},
            )
            workspace.publish(
                folder,
                section=key_fields(recipe),
                inputs={"tokenizer": tokenizer_manifest["digest"], **source_digests(recipe, workspace)},
                proofs=[
                    reload_proof(model_class, folder, probe, reference, model, engines.computed_dtype(trainer)),
                    sight_proof(seen, reference, masked=section.is_masked),
                ],
                metrics=metrics,
                timings={"prepare": before_training, "train": train_seconds},
            )
            shutil.rmtree(checkpoint_folder, ignore_errors=True)
    processes.wait_for_everyone(world_size)
    if rank != 0:
        return []
    validated = [each for each in history if f"eval_{figure}" in each and each["step"] > 0]
    best = min(validated, key=lambda each: each[f"eval_{figure}"], default=None)
    before = _at_start(history, f"eval_{figure}")
    what = "nats a masked token" if section.is_masked else "bits per byte"
    if best is not None and before is not None and best[f"eval_{figure}"] >= before:
        logger.warning(
            "training made the model no better on the validation split (%.3f %s, %.3f before); set a lower "
            "pretrain.learning_rate than %.1e, or add text",
            best[f"eval_{figure}"],
            what,
            before,
            rates.matrix,
        )
    return [
        *([("start", plan[0][1])] if start is not None else []),
        ("model", dict(plan)["model"]),
        (
            "trained",
            f"{metrics['train_tokens']:,} tokens in {_minutes(train_seconds)}, {metrics['tokens_per_s']:,.0f} tokens/s",
        ),
        (
            "validation",
            (
                f"{best[f'eval_{figure}']:.3f} {what} on {len(validation_rows or ()):,} rows"
                if best
                else "none (no split)"
            )
            + (f", {best['eval_masked_accuracy']:.1%} right" if best and section.is_masked else "")
            + (f", {before:.3f} before" if best and before else ""),
        ),
        ("energy", watching.energy_in_words(metrics["watched"])),
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
        sequence_length=recipe.section("pretrain").longest,
        masked=recipe.section("pretrain").is_masked,
    )


def _require_objective_tokens(recipe: Recipe) -> None:
    """Raises: UsageError if the tokenizer will not have the tokens that the objective needs, before it is made or used.

    The tokenizer stage gives them to whatever tokenizer it makes or takes, unless it is told not to.
    """
    from transformers import AutoTokenizer

    from hfscratch.tokens import objectives

    section, tokenizer = recipe.section("pretrain"), recipe.sections.get("tokenizer")
    if tokenizer is not None:
        if section.is_masked and tokenizer.mask is False:
            raise UsageError("pretrain.objective is mlm and tokenizer.mask is false; leave tokenizer.mask out")
    elif (recipe.out / "tokenizer" / "tokenizer.json").is_file():
        found = AutoTokenizer.from_pretrained(str(recipe.out / "tokenizer"), local_files_only=True)
        if section.is_masked:
            objectives.require_mask(found)
        if section.fim_rate:
            objectives.require_fim_tokens(found)


def _objective_in_words(section: PretrainSection, rows: Any) -> list[tuple[str, str]]:
    """What the plan says of an objective that is not each next token."""
    if section.is_masked:
        masking = section.masking
        ways = {"token": "token by token", "word": "word by word", "span": f"in spans of {masking.span_length:g} words"}
        kept = max(0.0, 1 - masking.mask_share - masking.random_share)
        shares = f"{masking.mask_share:.0%} masked, {masking.random_share:.0%} replaced at random, {kept:.0%} kept"
        words = f"mlm: {masking.probability:.0%} of the tokens are guessed, {ways[masking.unit]}; of them {shares}"
    elif section.fim_rate:
        words = (
            f"clm, {section.fim_rate:.0%} of the pieces rearranged to fill in a middle, which leaves out "
            f"{rows.left_out():.2%} of the text"
        )
    return [("objective", words)] if section.is_masked or section.fim_rate else []


def _checkpoint(recipe: Recipe) -> Path:
    """The folder that `pretrain.init_from` names. Raises: UsageError if it is one that this recipe writes."""
    from hfscratch import serving

    name = recipe.section("pretrain").init_from
    folder = serving.local_copy(name)
    if folder.resolve().is_relative_to(recipe.out.resolve()):
        raise UsageError(
            f"pretrain.init_from is {name}, which this recipe writes itself (its `out` is {recipe.out}); choose "
            "another `out`"
        )
    return folder


def _checkpoint_config(recipe: Recipe, folder: Path) -> Any:
    """A checkpoint's config, with what the recipe may change of it.

    Raises: UsageError for a `model` section that contradicts it, or rows longer than it reads.
    """
    from hfscratch import serving

    name, said = recipe.section("pretrain").init_from, recipe.sections.get("model")
    masked = recipe.section("pretrain").is_masked
    config = serving.load_config(folder, masked=masked)
    changes: dict[str, Any] = {}
    if said is not None:
        if said.type != config.model_type:
            raise UsageError(
                f"model.type is {said.type}, and pretrain.init_from is {name}, a {config.model_type}; leave the model "
                f"section out, or set model.type={config.model_type}"
            )
        given = dict(said.fields) | ({} if said.depth is None else {"num_hidden_layers": said.depth})
        for field, value in given.items():
            has = getattr(config, field, None)
            if value is None or value == has:
                continue
            if field not in MAY_CHANGE and "drop" not in field:
                shown = "depth" if field == "num_hidden_layers" and said.depth is not None else field
                raise UsageError(
                    f"model.{shown} is {value}, and pretrain.init_from is {name}, where it is {has}; leave it out: the "
                    "checkpoint decides"
                )
            changes[field] = _rotary(value, config) if field == "rope_parameters" else value
    return serving.load_config(folder, masked=masked, **changes) if changes else config


def _require_its_tokens(name: str, folder: Path, config: Any, tokenizer: Any) -> None:
    """Raises: UsageError if a tokenizer's ids are not those that a checkpoint was trained on."""
    from hfscratch import serving
    from hfscratch.tokens.tokenizer import num_ids, open_tokenizer

    rows = config.get_text_config().vocab_size
    if num_ids(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has ids up to {num_ids(tokenizer) - 1}, and pretrain.init_from, {name}, knows {rows} "
            f"tokens; set tokenizer.from={name}"
        )
    if not serving.has_tokenizer(folder):
        return  # whoever gave the tokenizer vouches for it
    own, _ = open_tokenizer(folder)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"the tokenizer has other tokens ({len(tokenizer):,}) than pretrain.init_from, {name}, was trained on "
            f"({len(own):,}); set tokenizer.from={name}"
        )


def _take_special_ids(config: Any, special_ids: Mapping[str, int]) -> None:
    """Fills in and puts right a config's special ids; ids that end a text beside the tokenizer's own are kept."""
    for name, token_id in special_ids.items():
        has = getattr(config, name, None)
        if not isinstance(has, list):
            setattr(config, name, token_id)
        elif token_id not in has:
            setattr(config, name, [token_id, *has])


def _collate_separated(rows: list[dict[str, Any]], *, separator: int) -> dict[str, Any]:
    """Rows of documents that one and the same token begins and ends: its first of two ends a text and is learnt, its
    second begins the next and is not."""
    from hfscratch import tokens
    from hfscratch.tokens.packing import IGNORED_LABEL

    batch = tokens.collate(rows)
    ids = batch["input_ids"]  # (batch, seq)
    begins = (ids[:, 1:] == separator) & (ids[:, :-1] == separator)
    batch["labels"][:, 1:].masked_fill_(begins, IGNORED_LABEL)
    return batch


def _rotary(given: dict[str, Any], config: Any) -> dict[str, Any]:
    """Rotary positions as a recipe changes them: what they scale is the checkpoint's."""
    has = config.rope_parameters or {}
    kept = {name: has[name] for name in ("rope_theta", "partial_rotary_factor") if name in has}
    if given.get("rope_type") in ("yarn", "llama3"):
        kept["original_max_position_embeddings"] = config.max_position_embeddings
    return kept | given


def _at_start(history: list[dict[str, Any]], figure: str) -> float | None:
    """The validation of a checkpoint before it was trained on."""
    return next((each[figure] for each in history if each["step"] == 0), None)


def _model_class(config: Any, section: PretrainSection) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    found: Any = AutoModelForMaskedLM if section.is_masked else AutoModelForCausalLM
    if type(config) not in found._model_mapping:
        kind, other = ("masked", "clm") if section.is_masked else ("causal", "mlm")
        raise UsageError(
            f"model.type is '{config.model_type}', which has no {kind} language model in transformers; take another "
            f"type, or pretrain.objective={other}, if it has one for that"
        )
    return found


def _largest_divisor(rows: int, at_most: int) -> int:
    return max(each for each in range(1, at_most + 1) if rows % each == 0)


def _curriculum(section: PretrainSection, num_parameters: int, sources: Any) -> Curriculum:
    """The steps of the run. Its tokens are those that the recipe gives, by tokens, steps, epochs, or the epochs of each
    source; or they follow from the model."""
    from hfscratch.tokens import ALL
    from hfscratch.training.batch import default_batch_tokens

    length, mixture = section.sequence_length, section.mixture
    epoch = {name: length * sources.rows_per_epoch(name, length) for name in mixture or (ALL,)}
    corpus_tokens = sum(epoch.values()) if mixture else int(sources.split.lengths.sum())
    is_by_epochs = mixture is not None and all(each.weight is None for each in mixture.values())
    tokens = int(min(section.tokens_per_parameter * num_parameters, section.max_epochs * corpus_tokens))
    if "num_train_epochs" in section.arguments:
        tokens = int(section.arguments["num_train_epochs"] * sum(epoch.values()))
    elif section.max_tokens is not None:
        tokens = section.max_tokens
    elif mixture is not None and is_by_epochs and all(each.mixture is None for each in section.phases):
        tokens = int(sum(Fraction(str(each.epochs)) * epoch[name] for name, each in mixture.items()))
    return plan_steps(
        [
            (0.0, length),
            *((each.share, row) for each, row in zip(section.phases, section.row_lengths[1:], strict=True)),
        ],
        tokens=tokens,
        max_steps=section.arguments.get("max_steps"),
        batch_tokens=section.batch_tokens or default_batch_tokens(tokens, section.longest),
        ramp=section.batch_ramp,
    )


def _rates(section: PretrainSection, config: Any) -> Any:
    from hfscratch.training.optimizer import ADAM_RATE, MUON_RATE, default_learning_rates

    muon = section.arguments.get("optim") == MUON
    rates = default_learning_rates(config.hidden_size, section.arguments.get("learning_rate"), muon=muon)
    if section.init_from is not None:
        matrix = section.arguments.get("learning_rate") or CONTINUED_RATE * rates.matrix
        others = matrix * (ADAM_RATE / MUON_RATE if muon else 1.0)
        rates = dataclasses.replace(rates, matrix=matrix, embedding=others, head=others, rest=others)
    given = {name: value for name, value in to_dict(section.learning_rates).items() if value is not None}
    return dataclasses.replace(rates, **given)


def _shape(config: Any) -> str:
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{getattr(config, 'num_attention_heads', 'no')} heads, vocabulary {config.vocab_size:,}"
    )


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"
