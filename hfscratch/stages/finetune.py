"""finetune: teaches the pretrained model (or any model folder) a task, by an adapter or in full.

Two tasks teach a causal model to answer: `docstring` (a Python function → its docstring; pairs are taken from the data
artifact, split by split) and `sft` (instruction data of one's own: chat messages, prompt and completion, or alpaca
columns). The loss is on the answers alone, the loop TRL's SFTTrainer. Two make a classifier of a causal or a masked
model: `exception` (a piece of Python code → the exception it catches; from the data artifact too) and `classification`
(texts and labels of one's own); the loop is transformers' Trainer. Both have our mixin; interrupted, the same command
goes on from its last checkpoint under `.work/finetune/`. ZeRO-3 and FSDP are not covered.

Writes `<out>/finetune/adapter` (what PeftModel opens; for method lora), `<out>/finetune/merged` (a plain model folder),
`test.jsonl` (prompts and references, or texts and labels, that were held out, for `evaluate`) and `metrics.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import MachineError, ProofFailed, UsageError, missing_extra
from hfscratch.recipe import Recipe, open_field, to_dict
from hfscratch.training.arguments import UNKEYED, argument_names, as_usage_errors, refused

logger = logging.getLogger(__name__)

INPUTS = ()
"""What is read depends on the recipe; see `inputs`."""
VERSION = 2
NUM_EVALUATIONS = 4
MAX_EVAL_EXAMPLES, MAX_EVAL_TEXTS = 128, 1024
"""Validation examples read at each validation: answers, and texts that are to be labelled."""
LONGEST_DEFAULT_SEQUENCE = 2048
FORGETTING_BYTES = 100_000
"""Bytes of the test split on which the base's own loss is measured before and after; a document counts with its first
tenth of that at most."""
SAMPLE_TOKENS = 32
LEARNING_RATES = {"lora": 4e-3, "full": 3e-4}
"""Peak learning rate by method at width 256, by a sweep on the docstring task; wider models want less (as the square
root of the width)."""
LABEL_LEARNING_RATES = {"lora": 2e-3, "full": 1e-4}
"""The same of classifiers, not swept: usual values."""
ROLES_LEARNING_RATE = 5e-4
"""Of the matrices of a Scratch classifier that is trained in full, at width 256, by two tries on the exception task.
Its other weights follow by their roles."""
TOLERANCE = 1e-5
"""Of logits that are claimed to be equal."""


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """The adapter."""

    rank: int = 16
    """Columns of its two matrices, for each layer."""
    alpha: float = 32.0
    """What it adds is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of the adapter's input."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get one; every linear layer but the head if not given."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank is {self.rank}; it must be at least 1")
        if self.alpha <= 0:
            raise UsageError(f"alpha is {self.alpha}; it must be positive")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class FinetuneSection:
    """What the model is taught, and how. Any field of transformers' TrainingArguments may stand here too."""

    task: Literal["docstring", "sft", "exception", "classification"]
    """docstring: a Python function → its docstring, from the data artifact; sft: instruction data of your own;
    exception: a piece of Python code → the exception that it catches, from the data artifact; classification: texts and
    labels of your own."""

    method: Literal["lora", "full"] = "lora"
    """lora trains a small adapter beside the frozen model, full every weight."""

    data: str | None = None
    """For sft: a .json, .jsonl(.gz) or .parquet file, a folder of them, or a Hub dataset, with the columns `messages`,
    or `prompt` and `completion`, or `instruction`, `input` and `output`. For classification .csv and .tsv too, with a
    column of texts and one of labels; files of a folder that are called train…, validation… (dev…) or test… are those
    splits, as are a Hub dataset's."""

    data_split: str = "train"
    """The split of a Hub dataset that is learnt from."""

    text_column: str | None = None
    """For classification: the column of texts; by the usual names (text, sentence, review …) if not given."""

    label_column: str | None = None
    """For classification: the column of labels, words or whole numbers; by the usual names (label, class …) if not
    given."""

    base: str | None = None
    """The model folder to start from; the run's own `pretrain` if not given."""

    adapter: str | None = None
    """For lora: the folder of an adapter of this base to go on with, in place of a fresh one."""

    docstring: Literal["summary", "whole"] = "summary"
    """What of a docstring is learnt: its first paragraph, as one line, or all of it."""

    sequence_length: int | None = None
    """The most tokens of an example; the base's context if not given, 2048 at most."""

    answer_tokens: int = 64
    """For docstring: tokens that are kept free for the answer, however long the function."""

    too_long: Literal["truncate", "drop", "refuse"] = "truncate"
    """What becomes of longer examples: cut (of a function the last lines, of a conversation or a text the end), left
    out, or exit 3. Each is counted."""

    packing: bool = False
    """Whether examples share rows, each seeing only itself; pays off on a GPU with flash attention."""

    chat_template: str | None = None
    """For sft: a Jinja file with generation markers; the tokenizer's own template if not given, ours if it has none."""

    validation_fraction: float = 0.05
    """For sft, and classification without a validation file: the share of examples that is watched while training."""

    test_fraction: float = 0.05
    """For sft, and classification without a test file: the share of examples that is held out for `evaluate`."""

    batch_size: int = 16
    """Examples (where they are packed: rows) an optimizer step, over all processes together."""

    epochs: float = 3.0
    """Where `max_steps` is not given, how often the examples are read."""

    lora: LoraSection = LoraSection()
    """The adapter's shape."""

    resume: Literal["auto", "changed", "anew"] = "auto"
    """What is done after an interruption. auto: go on from the last checkpoint, if nothing that affects the result has
    changed since. changed: even then. anew: begin again."""

    early_stopping_patience: int | None = 3
    """Stop after this many validations without improvement; the best checkpoint is what is published."""

    arguments: dict[str, Any] = open_field(
        lambda values: argument_names(),
        refused("finetune.batch_size")
        | {
            "num_train_epochs": "it is finetune.epochs here",
            "train_sampling_strategy": "the order of the examples is hfscratch's own",
        },
    )

    def __post_init__(self) -> None:
        if self.task in ("sft", "classification") and not self.data:
            instead = "; for a task without data of your own take exception" if self.is_classifier else ""
            raise UsageError(
                f"finetune.data is not given; task {self.task} needs a file, a folder or a Hub dataset{instead}"
            )
        if self.task in ("docstring", "exception") and self.data:
            what = "examples" if self.is_classifier else "pairs"
            raise UsageError(f"finetune.data is given, but task {self.task} takes its {what} from the data artifact")
        for name in ("text_column", "label_column"):
            if getattr(self, name) is not None and self.task != "classification":
                raise UsageError(f"finetune.{name} is given, but task {self.task} has no such column")
        for name in ("packing", "chat_template"):
            if getattr(self, name) and self.is_classifier:
                raise UsageError(f"finetune.{name} is for tasks whose answers are text, and not for {self.task}")
        if self.method == "full" and self.adapter:
            raise UsageError("finetune.adapter is given, but method full trains no adapter; take method=lora")
        for name in ("sequence_length", "answer_tokens", "batch_size", "epochs", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"finetune.{name} is {value}; it must be positive")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 0.5:
                raise UsageError(f"finetune.{name} is {getattr(self, name)}; it must be at least 0 and below 0.5")
        steps = self.arguments.get("max_steps")
        if isinstance(steps, int) and steps <= 0:
            raise UsageError(f"finetune.max_steps is {steps}; it must be positive")

    @property
    def is_classifier(self) -> bool:
        """Whether labels are learnt, and not answers."""
        return self.task in ("exception", "classification")


SECTIONS = {"finetune": FinetuneSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change the result."""
    unkeyed = UNKEYED | {"resume"}
    return {name: value for name, value in to_dict(recipe.section("finetune")).items() if name not in unkeyed}


def inputs(recipe: Recipe, out: Path) -> list[str]:
    """The artifacts that this recipe's finetuning reads: the model unless it has a base of its own, and the data, for
    tasks that take their examples from it and for what is forgotten of it; sft does without data that is not there, and
    a classifier of other texts can forget nothing, because it writes none."""
    section: FinetuneSection = recipe.section("finetune")
    needs_data = section.task in ("docstring", "exception") or (
        section.task == "sft" and artifact.read_manifest(out / "data") is not None
    )
    return (["data"] if needs_data else []) + ([] if section.base else ["pretrain"])


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """Digests of all that is read: artifacts, and the files of a foreign base, an adapter and instruction data."""
    from hfscratch.data import sources
    from hfscratch.training import tables

    section: FinetuneSection = recipe.section("finetune")
    found = {}
    for stage in inputs(recipe, workspace.out):
        manifest = artifact.read_manifest(workspace.out / stage)
        found[stage] = manifest["digest"] if manifest else "missing"
    read: list[tuple[str, Path, Sequence[Path]]] = []
    for name in ("base", "adapter"):
        path = getattr(section, name)
        if path and Path(path).is_dir():
            files = [each for each in Path(path).iterdir() if each.suffix in (".safetensors", ".json", ".jinja")]
            read.append((name, Path(path), files))
    formats = tables.EXTENSIONS if section.is_classifier else tables.RECORDS
    if section.data and (files := tables.files_of(section.data, formats)):
        read.append(("data", files[0].parent, files))
    if section.chat_template and Path(section.chat_template).is_file():
        read.append(("chat_template", Path(section.chat_template).parent, [Path(section.chat_template)]))
    listed = []
    for position, (name, root, held_files) in enumerate(read):
        stats = [(each.name, each.stat()) for each in sorted(held_files)]
        held = tuple(sources.SourceFile(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        listed.append(sources.FoundSource(position, name, root, held, {}, None, None, ""))
    digests = sources.digests(listed, workspace.work / "digests.json")
    return found | {
        f"{read[int(key.split('/')[0])][0]}/{key.split('/', 1)[1]}": value for key, value in digests.items()
    }


def check(recipe: Recipe) -> None:
    """Checks libraries, arguments, the instruction data and a foreign base, before any stage works."""
    from hfscratch.training import engines

    engines.require_launch(whole_models="finetune")
    section: FinetuneSection = recipe.section("finetune")
    _require_libraries(section)
    _trainer_arguments(section, Path("unused"), recipe.seed, max_steps=100, has_validation=True)
    if section.chat_template and not Path(section.chat_template).is_file():
        raise UsageError(f"finetune.chat_template: there is no file {section.chat_template}")
    if section.adapter and not (Path(section.adapter) / "adapter_config.json").is_file():
        raise UsageError(f"finetune.adapter: {section.adapter} holds no adapter (adapter_config.json)")
    if section.adapter:
        _require_adapter_of_task(section, Path(section.adapter))
    if section.base is None:
        _require_base_of_task(section, recipe)
    labels = None
    if section.task == "classification":
        labels = _labelled(section, recipe.out / "data", recipe.seed).labels
    elif section.data:
        from hfscratch.training import conversations

        conversations.read_examples(section.data, section.data_split)
    if section.base:
        # How many labels the data will have makes no difference to whether a base can be used.
        base = _load_base(section, Path(section.base), labels or (["0", "1"] if section.is_classifier else None))
        _sequence_length(section, base.model.config)


def _require_adapter_of_task(section: FinetuneSection, folder: Path) -> None:
    """Raises: UsageError if the adapter was trained for a task of the other sort."""
    from hfscratch.training import sft

    needed, found = sft.task_type(is_classifier=section.is_classifier), sft.adapter_task_type(folder)
    if found not in (needed, None):
        raise UsageError(
            f"finetune.adapter: the adapter in {folder} is for task_type {found}, and finetune.task={section.task} "
            f"needs one for {needed}; give such a one, or leave it out"
        )


def _require_base_of_task(section: FinetuneSection, recipe: Recipe) -> None:
    """Raises: UsageError if the run's own model, as it stands there or as the recipe describes it, cannot do this."""
    from hfscratch import serving

    pretrain = recipe.sections.get("pretrain")
    is_masked = pretrain.is_masked if pretrain else serving.is_masked(recipe.out / "pretrain")
    if is_masked and not section.is_classifier:
        raise UsageError(
            f"finetune.task is {section.task}, which teaches a model to write, and pretrain.objective is mlm; take "
            "exception or classification, or objective clm"
        )
    if not section.is_classifier or pretrain is None or pretrain.init_from is not None:
        return
    model = recipe.sections.get("model")
    if model and not serving.has_classifier(model.type):
        raise UsageError(
            f"finetune.task is {section.task}, and transformers has no classifier of texts for model.type "
            f"'{model.type}'; take another type"
        )


@dataclass(frozen=True)
class _Base:
    """The model that finetuning starts from, as it was loaded.

    Attributes:
        opens: a folder → model and tokenizer, as this one was opened: for the same labels, if it is a classifier.
        fresh: of a classifier, the names of the weights that the folder has not.
    """

    folder: Path
    model: Any
    tokenizer: Any
    opens: Callable[[Path], tuple[Any, Any]]
    fresh: Sequence[str] = ()


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Trains, merges, proves, measures what was forgotten, publishes."""
    section: FinetuneSection = recipe.section("finetune")
    _require_libraries(section)
    import torch
    import transformers
    from datasets import Dataset

    from hfscratch import serving
    from hfscratch.planning.shape import matmul_parameters, training_flops_per_token
    from hfscratch.tokens.chat import set_chat_template
    from hfscratch.training import (
        batch,
        callbacks,
        classification,
        engines,
        guard,
        optimizer,
        precision,
        processes,
        sft,
        watching,
    )
    from hfscratch.training.examples import bytes_per_answer_token, training_order
    from hfscratch.training.trainer import open_run, train_or_resume

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    started = time.perf_counter()
    digests = {}
    for stage in inputs(recipe, workspace.out):
        manifest = artifact.read_manifest(workspace.input(stage))
        assert manifest is not None
        digests[stage] = manifest["digest"]

    chosen = precision.choose_precision()  # before SFTConfig writes its own choice into the environment
    make_config = functools.partial(_trainer_arguments, section, workspace.work / workspace.key[:16], recipe.seed)
    arguments = make_config(max_steps=1, has_validation=False)  # joins the processes
    # What a process measures for itself, the first measures for all.
    if not processes.broadcast(workspace.is_stale, world_size):
        return []
    chosen = processes.broadcast(chosen, world_size)
    training = open_run(
        workspace, arguments, section="finetune", resume=section.resume, precision=chosen, guard=guard.Guard()
    )
    chosen = precision.as_before(chosen, training.facts["precision"])

    data_folder = workspace.out / "data"
    labelled = _labelled(section, data_folder, recipe.seed) if section.is_classifier else None
    transformers.set_seed(recipe.seed)  # a classifier's head is drawn
    base_folder = Path(section.base) if section.base else workspace.input("pretrain")
    base = _load_base(section, base_folder, labelled.labels if labelled else None)
    model, tokenizer = base.model, base.tokenizer
    sequence_length = _sequence_length(section, model.config)
    if section.task == "sft":
        set_chat_template(tokenizer, Path(section.chat_template) if section.chat_template else None)
    examples: Any
    if labelled:
        examples = classification.label_examples(
            labelled, tokenizer, sequence_length=sequence_length, too_long=section.too_long
        )
        labelled = dataclasses.replace(labelled, splits=examples.texts)  # from here on, what is learnt from
    else:
        examples = _examples(section, base, data_folder, sequence_length)
    texts = _test_texts(data_folder) if "data" in digests and not labelled else []
    before = _bits_per_byte(model, tokenizer, texts, "forgetting, before") if rank == 0 else None
    cheap = _bag_of_words(examples) if labelled and rank == 0 else {}

    base_digest, num_parameters = sft.weights_digest(base.folder), model.num_parameters()
    num_matmul = matmul_parameters(model)
    transformers.set_seed(recipe.seed)
    if section.method == "lora" and section.adapter:
        model = sft.load_adapter(model, Path(section.adapter), base_digest=base_digest, is_trainable=True)
    elif section.method == "lora":
        lora = section.lora
        model = sft.add_adapter(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            fresh=base.fresh if labelled else None,
        )
    num_trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)

    if section.batch_size % world_size:
        nearest = max(1, round(section.batch_size / world_size)) * world_size
        raise UsageError(
            f"finetune.batch_size is {section.batch_size}, which does not divide over {world_size} processes; the "
            f"nearest value that does is {nearest}"
        )
    rows = [dataclasses.asdict(each) for each in examples.train]
    longest = sequence_length if section.packing else max(len(row["input_ids"]) for row in rows)
    rows_per_process = section.batch_size // world_size
    micro_rows = training.earlier.get("micro_rows") or processes.broadcast(
        batch.micro_batch_rows(rows_per_process, longest, batch.activation_bytes_per_token(model.config)), world_size
    )
    training.facts["micro_rows"] = micro_rows
    if rank == 0:
        artifact.require_free_space(training.folder, 4 * (4 * num_trainable + 2 * num_parameters))
    train_set = Dataset.from_list(rows)
    validation_set = None
    if examples.validation:
        # By length, because a batch is padded to its longest row.
        most = MAX_EVAL_TEXTS if labelled else MAX_EVAL_EXAMPLES
        watched = sorted(examples.validation[:most], key=lambda each: len(each.input_ids))
        validation_set = Dataset.from_list([dataclasses.asdict(each) for each in watched])
    num_rows = len(rows)
    if section.packing:
        # Packing decides how many rows there are, and the number of steps has to be known before the trainer is made.
        from trl import pack_dataset

        num_rows = len(pack_dataset(train_set, sequence_length, "bfd"))
    max_steps = section.arguments.get("max_steps") or max(1, math.ceil(section.epochs * num_rows / section.batch_size))
    if not section.packing:
        lengths = [len(row["input_ids"]) for row in rows]
        order = training_order(lengths, batch_size=section.batch_size, num_steps=max_steps, seed=recipe.seed)
        train_set = train_set.select(order)
    mean_length = sum(len(row["input_ids"]) for row in rows) / num_rows
    flops = training_flops_per_token(base.model, round(mean_length))  # by now with the adapter in it
    if section.method == "lora":  # what is frozen needs no gradient, a third of its products
        flops -= 2 * num_matmul
    bytes_per_token = 0.0 if labelled else bytes_per_answer_token(tokenizer, examples.train)
    watch = watching.Watch(
        training.folder,
        tokens_at=lambda steps: steps * round(mean_length * section.batch_size),
        flops_at=lambda steps: steps * round(mean_length * section.batch_size) * flops,
        bytes_per_token=None if labelled else lambda step: bytes_per_token,
        eval_bytes_per_token=(
            None if labelled else bytes_per_answer_token(tokenizer, examples.validation or examples.train)
        ),
        matrix_rate=precision.matrix_rate(chosen.name, world_size),
    )
    # By the ratios that Scratch was pretrained with; what others were pretrained with is not known.
    by_role = bool(labelled) and section.method == "full" and model.config.model_type == "scratch"
    config = make_config(
        max_steps=max_steps,
        has_validation=bool(examples.validation),
        chosen=chosen,
        micro_rows=micro_rows,
        accumulation=rows_per_process // micro_rows,
        sequence_length=sequence_length,
        width=model.config.get_text_config().hidden_size,
        by_role=by_role,
    )
    trainer_callbacks: list[Any] = [training.guard, callbacks.ProgressBar("finetune")]
    if examples.validation and not labelled:
        room = sequence_length - len(tokenizer(examples.sample_prompt, verbose=False)["input_ids"]) - 1
        if room > 0:
            trainer_callbacks.append(
                callbacks.Samples(
                    tokenizer,
                    prompt=examples.sample_prompt,
                    max_new_tokens=min(SAMPLE_TOKENS, room),
                    seed=recipe.seed,
                    shows_prompt=False,
                )
            )
    if config.load_best_model_at_end and section.early_stopping_patience:
        trainer_callbacks.append(transformers.EarlyStoppingCallback(section.early_stopping_patience))
    plan = [
        ("task", f"{section.task}, {len(examples.train):,} examples of {mean_length:.0f} tokens a row on average"),
        (
            "method",
            f"{section.method}, {num_trainable / 1e6:.2f} M trainable; the base has {num_parameters / 1e6:.2f} M",
        ),
        ("steps", f"{max_steps:,} of {section.batch_size} ({max_steps * section.batch_size / num_rows:.2g} epochs)"),
        ("precision", f"{chosen.name}, because {chosen.reason}"),
    ]
    if labelled:
        plan[1:1] = [("labels", labelled.shares)]
        if base.fresh:
            plan.append(("drawn anew", f"{', '.join(base.fresh)}: the base has none"))
    if rank == 0:
        logger.info("finetune will train:\n%s", "\n".join(f"  {label:<10} {value}" for label, value in plan))

    way: Any = classification if labelled else sft
    with as_usage_errors("finetune"):
        trainer = way.make_trainer(
            model=model,
            args=config,
            train_set=train_set,
            validation_set=validation_set,
            tokenizer=tokenizer,
            callbacks=[*trainer_callbacks, watch],
        )
    if by_role:
        trainer.learning_rates = optimizer.default_learning_rates(model.config.hidden_size, config.learning_rate)
    name = f"finetune-{workspace.key[:8]}"
    watching.keep_trackers(trainer, workspace.out / "logs" / "finetune", project=recipe.name, name=name)
    trainer.run = training
    trainer.remove_callback(transformers.PrinterCallback)
    difference, loss = way.loss_difference(trainer)
    loss_proof = Proof(
        "the trainer's loss is the model's own, example by example",
        difference <= 1e-4 * max(1.0, loss),
        f"{loss:.4f} nats {'a label' if labelled else 'an answer token'}, difference {difference:.1e}",
    )
    if not loss_proof.holds:
        raise ProofFailed(
            f"finetune: the trainer's loss is not the model's own ({loss_proof.evidence}), so that training would "
            f"learn something else; {'try packing=false' if section.packing else 'this model type cannot be used'}"
        )
    transformers.set_seed(recipe.seed + rank)  # each process drops out other values
    before_training = time.perf_counter() - started
    train_or_resume(trainer, section="finetune")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    is_rounded = training.facts["engine"].startswith("zero")
    state = engines.gather(trained, is_kept=rank == 0) if is_rounded else {}
    if rank != 0:
        processes.wait_for_everyone(world_size)
        return []
    if is_rounded:
        _put_back_fp32(trained, base, state)
    probe = torch.tensor([max(examples.train, key=lambda each: len(each.input_ids)).input_ids], device=trained.device)
    reference = _logits(trained, probe)
    after_training = time.perf_counter()
    with workspace.staging() as folder:
        proofs = [loss_proof, _disjoint_proof(section, examples)]
        merged = folder / "merged"
        if section.method == "lora":
            proofs += _publish_adapter(trained, base, folder, base_digest, section, probe, reference)
        else:
            trained.config.use_cache = base.model.config.use_cache = True  # switched off for training
            trained.save_pretrained(str(merged))
            reloaded = _logits(_reload(section, merged, probe), probe)
            claim = "the merged folder reloads to the trained model's logits"
            proofs.append(_equal(claim, reloaded, reference, probe))
        _save_tokenizer(tokenizer, merged, sequence_length if labelled else serving.context_of(model.config))
        if (base.folder / "generation_config.json").is_file() and not labelled:
            shutil.copy(base.folder / "generation_config.json", merged)  # with the base's own settings
        finetuned, merged_tokenizer = base.opens(merged)
        after = _bits_per_byte(finetuned, merged_tokenizer, texts, "forgetting, after")
        if labelled:
            for record, label in zip(examples.test, cheap["test"], strict=True):
                record["bag_of_words"] = label
        with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in examples.test)
        history, samples = watching.curve(trainer.state.log_history)
        losses = [row["eval_loss"] for row in history if "eval_loss" in row]
        train_seconds = max((each.get("seconds", 0.0) for each in trainer.state.log_history), default=0.0)
        loads_best = config.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
        published_step = trainer.state.best_global_step if loads_best else trainer.state.global_step
        label_figures = None
        if labelled:
            label_figures = _label_figures(labelled, examples, cheap, finetuned, merged_tokenizer, recipe.seed)
            kept = next(
                (row["eval_loss"] for row in history if row["step"] == published_step and "eval_loss" in row), None
            )
            label_figures["loss"] = {"before": losses[0], "after": kept} if losses else None
        metrics = {
            "task": section.task,
            "method": section.method,
            "trainable_parameters": num_trainable,
            "parameters": finetuned.num_parameters(),
            "steps": trainer.state.global_step,
            "published_step": published_step,
            "examples": examples.counts,
            "answers": {"before": losses[0], "after": min(losses[1:] or losses)} if losses and not labelled else None,
            "forgetting": {"split": "test", "before": before, "after": after} if texts else None,
            "labels": label_figures,
            "most_frequent_answer": examples.frequent_answer,
            "train_seconds": train_seconds,
            "precision": chosen.name,
            "processes": world_size,
            "engine": training.facts["engine"],
            "watched": watch.summary(history),
        }
        artifact.write_json(
            folder / "metrics.json",
            {**metrics, "history": history, "samples": samples, "plan": plan, "resumes": watch.resumes},
        )
        workspace.publish(
            folder,
            section=key_fields(recipe),
            inputs=digests,
            proofs=proofs,
            metrics=metrics,
            timings={
                "prepare": before_training,
                "train": train_seconds,
                "publish": time.perf_counter() - after_training,
            },
        )
        shutil.rmtree(training.folder, ignore_errors=True)
    processes.wait_for_everyone(world_size)
    return [*_rows(metrics, plan), ("energy", watching.energy_in_words(metrics["watched"]))]


# ---------------------------------------------------------------------------------------------------------------------
# The parts of `run`


def _require_libraries(section: FinetuneSection) -> None:
    import transformers

    for module, package in (("trl", "trl"), ("peft", "peft"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None and (module != "sklearn" or section.is_classifier):
            raise missing_extra(package, "finetune")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MachineError(f"finetuning needs transformers 5, and {transformers.__version__} is installed")


def _load_folder(folder: Path) -> tuple[Any, Any]:
    from hfscratch import serving

    model, tokenizer = serving.load_model(folder)
    return model.float(), tokenizer


def _load_classifier(labels: Sequence[str], folder: Path) -> tuple[Any, Any]:
    from hfscratch import serving

    model, tokenizer, _ = serving.load_classifier(folder, labels)
    return model, tokenizer


def _load_base(section: FinetuneSection, folder: Path, labels: Sequence[str] | None) -> _Base:
    """The base in fp32, with a head for these labels, if there are any.

    Raises: UsageError if its tokenizer is another model's, or it is no model at all.
    """
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"finetune.base: {folder} holds an adapter; give the model it was made for as finetune.base, and the "
            "adapter as finetune.adapter"
        )
    if not folder.is_dir():
        raise UsageError(f"finetune.base: there is no model folder at {folder}")
    fresh: Sequence[str] = ()
    if labels is None:
        model, tokenizer = _load_folder(folder)
    else:
        from hfscratch import serving

        model, tokenizer, fresh = serving.load_classifier(folder, labels)
        # Types that read the first token, or count positions from it, would otherwise read padding.
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token_id is None:
            raise UsageError(f"the tokenizer in {folder} has no padding token, so texts cannot share a batch")
    compared = []
    for name in ("bos_token_id", "eos_token_id"):
        ours = getattr(tokenizer, name)
        declared: set[Any] = set()
        for config in (model.config, getattr(model, "generation_config", None)):
            value = getattr(config, name, None)
            declared |= set(value if isinstance(value, list) else [value])
        declared.discard(None)
        if ours is not None and declared:
            compared.append((name, ours, declared))
    if compared and not any(ours in theirs for _, ours, theirs in compared):
        name, ours, theirs = compared[-1]
        raise UsageError(
            f"the tokenizer in {folder} is another model's: its {name} is {ours}, and the model's is "
            f"{', '.join(map(str, sorted(theirs)))}; put the tokenizer there that the model was trained with"
        )
    if tokenizer.eos_token_id is None and labels is None:
        raise UsageError(f"the tokenizer in {folder} has no end-of-text token, so an answer could not be ended")
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"the tokenizer in {folder} has no tokenizer.json, which finetuning needs")
    if labels is None:
        return _Base(folder, model, tokenizer, _load_folder)
    return _Base(folder, model, tokenizer, functools.partial(_load_classifier, labels), fresh)


def _examples(section: FinetuneSection, base: _Base, data: Path, sequence_length: int) -> Any:
    """Everything that is learnt from and tested on, encoded for the base's tokenizer."""
    from hfscratch.training import conversations, examples

    if section.task == "docstring":
        return examples.docstring_examples(
            {split: _documents(data, split) for split in ("train", "validation", "test")},
            base.tokenizer,
            whole=section.docstring == "whole",
            sequence_length=sequence_length,
            answer_tokens=section.answer_tokens,
            too_long=section.too_long,
        )
    assert section.data is not None
    found, left_out = conversations.read_examples(section.data, section.data_split)
    if any(example.messages for example in found):
        examples.require_trainable_template(base.tokenizer, str(section.chat_template or base.folder))
    made = examples.instruction_examples(
        found,
        base.tokenizer,
        validation_fraction=section.validation_fraction,
        test_fraction=section.test_fraction,
        sequence_length=sequence_length,
        too_long=section.too_long,
    )
    made.counts["all"] = {"found": len(found) + sum(left_out.values()), **left_out}
    return made


def _labelled(section: FinetuneSection, data: Path, seed: int) -> Any:
    """The texts and labels that a classifier is made from, in their splits."""
    from hfscratch.training import classification

    if section.task == "exception":
        clauses = classification.read_clauses({split: _documents(data, split) for split in classification.SPLITS})
        made = classification.split_texts(clauses, validation_fraction=0.0, test_fraction=0.0, seed=seed)
        return dataclasses.replace(made, has_holes=True)
    assert section.data is not None
    found, order, left_out = classification.read_texts(
        section.data, section.data_split, text_column=section.text_column, label_column=section.label_column
    )
    labelled = classification.split_texts(
        found,
        order,
        validation_fraction=section.validation_fraction,
        test_fraction=section.test_fraction,
        seed=seed,
    )
    if left_out:
        labelled.counts["all"] = {"found": sum(map(len, found.values())) + sum(left_out.values()), **left_out}
    return labelled


def _documents(data: Path, split: str) -> Iterator[tuple[str, str]]:
    from hfscratch import tokens

    for ids, texts in tokens.read_documents(data, split):
        yield from zip(ids, texts, strict=True)


def _sequence_length(section: FinetuneSection, config: Any) -> int:
    from hfscratch import serving

    context = serving.context_of(config)
    if section.sequence_length is None:
        return min(context or LONGEST_DEFAULT_SEQUENCE, LONGEST_DEFAULT_SEQUENCE)
    if context is not None and section.sequence_length > context:
        raise UsageError(
            f"finetune.sequence_length is {section.sequence_length}; the base reads {context} tokens at most"
        )
    return section.sequence_length


def _trainer_arguments(
    section: FinetuneSection,
    folder: Path,
    seed: int,
    *,
    max_steps: int,
    has_validation: bool,
    chosen: Any = None,
    micro_rows: int = 1,
    accumulation: int = 1,
    sequence_length: int = 256,
    width: int = 256,
    by_role: bool = False,
) -> Any:
    import torch
    from transformers import TrainingArguments
    from trl import SFTConfig

    rates = LABEL_LEARNING_RATES if section.is_classifier else LEARNING_RATES
    rate = ROLES_LEARNING_RATE if by_role else rates[section.method]
    every = max(1, math.ceil(max_steps / NUM_EVALUATIONS))
    values: dict[str, Any] = {
        "learning_rate": rate * math.sqrt(256 / width),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "warmup_steps": max(1, max_steps // 20),
        "lr_scheduler_type": "cosine",
        "logging_steps": max(1, min(20, max_steps // 30)),
        "eval_strategy": "steps" if has_validation else "no",
        "eval_steps": every,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "report_to": "none",
        "train_sampling_strategy": "random" if section.packing else "sequential",  # of an order of our own
    }
    values |= section.arguments
    if not has_validation:
        values["eval_strategy"] = "no"
    if values["eval_strategy"] == "no":
        values["eval_on_start"] = False
    values["max_steps"] = max_steps
    values.setdefault("load_best_model_at_end", values["eval_strategy"] != "no")
    values |= {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bool(chosen and chosen.name == "bf16"),
        "fp16": bool(chosen and chosen.name == "fp16"),
        "per_device_train_batch_size": micro_rows,
        "per_device_eval_batch_size": micro_rows,
        "gradient_accumulation_steps": accumulation,
        # A classifier that overfits grows surer of its mistakes, so that its loss rises long before its accuracy falls.
        "metric_for_best_model": "eval_accuracy" if section.is_classifier else "eval_loss",
        "greater_is_better": section.is_classifier,
        "prediction_loss_only": not section.is_classifier,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
    }
    with as_usage_errors("finetune"):
        if section.is_classifier:
            return TrainingArguments(**values)
        return SFTConfig(
            **{"activation_checkpointing": False} | values,
            max_length=sequence_length if section.packing else None,
            packing=section.packing,
            dataset_kwargs={"skip_prepare_dataset": not section.packing},
        )


def _test_texts(data: Path) -> list[str]:
    """The beginning of each test document, until there are `FORGETTING_BYTES`."""
    texts = []
    room = FORGETTING_BYTES
    for _, text in _documents(data, "test"):
        piece = text[: FORGETTING_BYTES // 10]
        size = len(piece.encode())
        if size <= room:
            texts.append(piece)
            room -= size
    return texts


def _bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str], label: str) -> float | None:
    from hfscratch.evaluation.likelihood import score_texts

    return score_texts(model, tokenizer, texts, progress=label).bits_per_byte if texts else None


def _bag_of_words(examples: Any) -> dict[str, list[str]]:
    """What the words of held-out texts alone say of their labels."""
    from hfscratch.evaluation import labels

    texts = {split: [each.text for each in found] for split, found in examples.texts.items()}
    predict = labels.bag_of_words(texts["train"], [each.label for each in examples.texts["train"]])
    return {split: predict(texts[split]) for split in ("validation", "test")}


def _label_figures(
    labelled: Any, examples: Any, cheap: Mapping[str, Sequence[str]], model: Any, tokenizer: Any, seed: int
) -> dict[str, Any]:
    """The labels, how many texts have each, and figures on the whole validation split beside those of cheap guesses."""
    from hfscratch import serving
    from hfscratch.evaluation import answers, labels

    found = {"names": labelled.labels, "counts": labelled.label_counts, "validation": None, "comparisons": []}
    texts = examples.texts["validation"]
    if not texts:
        return found
    logits = labels.label_logits(
        model,
        tokenizer,
        [each.text for each in texts],
        context=serving.context_of(model.config),
        progress="validation",
    )
    compared = answers.compare(
        {"finetune": labels.likeliest(model, logits)},
        [
            answers.Question(each.id, each.text, each.label, bag_of_words=label)
            for each, label in zip(texts, cheap["validation"], strict=True)
        ],
        metrics=tuple(labels.METRICS),
        most_frequent=labelled.frequent_label,
        seed=seed,
    )
    return found | {"validation": compared.summaries, "comparisons": compared.comparisons}


def _put_back_fp32(trained: Any, base: _Base, state: Mapping[str, Any]) -> None:
    """DeepSpeed leaves the rounded weights that it computes with. What was trained is that of its optimizer, and the
    rest that of the base."""
    fresh, _ = base.opens(base.folder)
    frozen = dict(fresh.named_parameters()) | dict(fresh.named_buffers())

    def of_base(name: str) -> Any:
        return frozen.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))

    trained.float()
    for name, parameter in trained.named_parameters():
        whole = state[name] if parameter.requires_grad else of_base(name)
        if whole is None:  # an adapter's own, which is not trained
            continue
        parameter.data = whole.detach().to(parameter.device, parameter.dtype)
    for name, buffer in trained.named_buffers():
        if (whole := of_base(name)) is not None:
            buffer.data = whole.detach().to(buffer.device)


def _publish_adapter(
    trained: Any, base: _Base, folder: Path, base_digest: str, section: FinetuneSection, probe: Any, reference: Any
) -> list[Proof]:
    """Writes `adapter` and `merged`, both read back from the disk as a user would, and compares their logits."""
    from hfscratch.training import sft

    # A model of the run itself is named as the recipe's `out` has it, which is right from where the recipe was run.
    sft.save_adapter(trained, folder / "adapter", base=section.base or str(base.folder), base_digest=base_digest)
    fresh, _ = base.opens(base.folder)
    adapted = sft.load_adapter(fresh, folder / "adapter", base_digest=base_digest).to(probe.device)
    adapter_logits = _logits(adapted, probe)
    precise = _logits(adapted.double(), probe)
    merged = adapted.float().merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.save_pretrained(str(folder / "merged"))
    reloaded = _reload(section, folder / "merged", probe)
    in_fp32 = (_logits(reloaded, probe) - adapter_logits).abs().max().item()
    # In fp64, because the two add the same numbers up in another order, and fp32 rounds each sum.
    difference = (_logits(reloaded.double(), probe) - precise).abs().max().item()
    return [
        _equal("the published adapter on its base gives the trained model's logits", adapter_logits, reference, probe),
        Proof(
            "the merged model gives the logits of the adapter on its base",
            difference <= TOLERANCE,
            f"max |Δlogit| {difference:.1e} in fp64, {in_fp32:.1e} in fp32, {probe.shape[1]} tokens",
        ),
    ]


def _equal(claim: str, one: Any, other: Any, probe: Any) -> Proof:
    difference = (one - other).abs().max().item()
    scale = max(1.0, other.abs().max().item())
    return Proof(claim, difference <= TOLERANCE * scale, f"max |Δlogit| {difference:.1e}, {probe.shape[1]} tokens")


def _reload(section: FinetuneSection, folder: Path, probe: Any) -> Any:
    """The model of a folder, by nothing but transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cls: Any = AutoModelForSequenceClassification if section.is_classifier else AutoModelForCausalLM
    return cls.from_pretrained(str(folder), use_safetensors=True).to(probe.device)


def _logits(model: Any, input_ids: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=input_ids).logits.double().cpu()  # (1, seq, vocab), or (1, labels)


def _save_tokenizer(tokenizer: Any, folder: Path, most_tokens: int | None) -> None:
    from hfscratch import tokens

    if most_tokens is not None:
        tokenizer.model_max_length = most_tokens
    tokens.save_tokenizer(tokenizer, folder)


def _disjoint_proof(section: FinetuneSection, examples: Any) -> Proof:
    what = {"docstring": "function", "sft": "question"}.get(section.task, "text")
    return Proof(
        f"no {what} of the test split was trained on",
        examples.num_shared == 0,
        f"{examples.num_shared} of {len(examples.test):,} are among {len(examples.train):,} training examples",
    )


def _label_rows(labels: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Accuracy and macro F1 of the classifier and of cheap guesses, on the validation split."""
    if labels["validation"] is None:
        return []
    names = {"finetune": "", "most_frequent_answer": "always the most frequent ", "bag_of_words": "bag of words "}
    rows = []
    for metric, label in (("accuracy", "accuracy"), ("macro_f1", "macro F1")):
        told = []
        for who, name in names.items():
            figure = labels["validation"][who][metric]
            told.append(f"{name}{figure['value']:.3f} ({figure['interval'][0]:.3f} to {figure['interval'][1]:.3f})")
        rows.append((f"{label}, validation", "; ".join(told)))
    for each in labels["comparisons"]:
        if (each["metric"], each["over"]) == ("accuracy", "bag_of_words"):
            low, high = each["interval"]
            rows.append(("accuracy over bag of words", f"{each['difference']:+.3f} ({low:+.3f} to {high:+.3f})"))
    return rows


def _rows(metrics: Mapping[str, Any], plan: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    rows = [row for row in plan if row[0] in ("task", "labels", "method")]
    left_out = {
        f"{reason}, {split}": count
        for split, found in metrics["examples"].items()
        for reason, count in found.items()
        if count and reason not in ("found", "used")
    }
    if left_out:
        rows.append(("not as found", "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())))
    if metrics["labels"]:
        rows += _label_rows(metrics["labels"])
    if metrics["answers"]:
        before, after = (metrics["answers"][when] for when in ("before", "after"))
        rows.append(("answers, validation", f"{before:.3f} → {after:.3f} nats a token"))
    if metrics["forgetting"]:
        before, after = (metrics["forgetting"][when] for when in ("before", "after"))
        rows.append(("the base's own text, test", f"{before:.3f} → {after:.3f} bits per byte"))
    return rows
