"""export: writes the finished model for other runtimes, or a training checkpoint as a plain model folder.

`hf` makes `<out>/export/hf/`, a plain `from_pretrained` folder with model, tokenizer and code, of whatever it is given:
also of a training checkpoint whose weights ZeRO or FSDP shared out over processes. It takes the memory of the model's
fp32 weights twice.

`onnx` makes `<out>/export/onnx/`, a folder as those of onnx-community: configuration and tokenizer at the root,
`onnx/model.onnx` and its quantized copies beside it. `hfscratch.export`, Optimum and transformers.js open it. Every
file is run and compared with the model it was made from before it is published.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import MachineError, UsageError
from hfscratch.recipe import Recipe, to_dict
from hfscratch.training import checkpoints

INPUTS = ()
"""None that every run has: `source_digests` says which artifacts are read."""
VERSION = 2
NUM_PROMPTS = 20
PROMPT_TOKENS = (3, 40)
"""The shortest and the longest prompt of the comparison; the others lie between."""
NUM_COMPARED = 4
"""Prompts, the longest, whose logits are compared."""
GREEDY_TOKENS = 24
SPEED_TOKENS = 64
SPEED_TURNS = 4
MOST_LOST = 0.005
"""Of bits per byte, by 8-bit weights."""
MODEL_FOLDERS = ("", "pretrain", "finetune/merged")
"""Where a model may lie in a folder that is given for it."""


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """Which files are made, of which model."""

    formats: tuple[Literal["hf", "onnx"], ...] = ("onnx",)
    """What to write: onnx, one graph and its smaller copies; hf, a plain from_pretrained folder."""

    source: Literal["auto", "pretrain", "finetune"] = "auto"
    """Whose model; auto takes the finetuned one if there is one."""

    model: str | None = None
    """Any model folder, or a training checkpoint (checkpoint-N) of your own, in place of this run's model."""

    quantized: tuple[Literal["q8", "q4"], ...] = ("q8", "q4")
    """The smaller copies of the ONNX graph: weights in 8 bits (onnx/model_quantized.onnx) and in 4
    (onnx/model_q4.onnx)."""

    test_bytes: int = 30_000
    """Bytes of the test split on which bits per byte of every file are compared; 0 for none."""

    def __post_init__(self) -> None:
        if not self.formats:
            raise UsageError("formats is empty; it must name at least one of: hf, onnx")
        if self.test_bytes < 0:
            raise UsageError(f"test_bytes is {self.test_bytes}; it must not be negative")
        if self.model is not None and self.source != "auto":
            raise UsageError(f"source is {self.source} and model is {self.model}; give one of them")


SECTIONS = {"export": ExportSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change the result: all."""
    return to_dict(recipe.section("export"))


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """The digests of what is read: the model, and the data if this run has any."""
    section: ExportSection = recipe.section("export")
    found = {}
    if section.model is not None:
        files = sorted(path for path in Path(section.model).glob("*") if path.is_file())
        found["model"] = artifact.digest_json([(path.name, *_size_and_time(path)) for path in files])
    for stage in ("data", *([] if section.model else [_source(section, workspace)])):
        manifest = artifact.read_manifest(workspace.out / stage)
        if manifest is not None:
            found[stage] = manifest["digest"]
    return found


def check(recipe: Recipe) -> None:
    """Raises: MachineError if a package is missing; UsageError if `export.model` is no folder of a model."""
    from hfscratch.export.graph import require_packages

    section: ExportSection = recipe.section("export")
    if "onnx" in section.formats:
        require_packages()
    if section.model is None:
        if "finetune" in recipe.sections and recipe.section("finetune").is_classifier and section.source != "pretrain":
            raise UsageError(_not_exported("what this recipe finetunes"))
        is_finetuned = section.source != "pretrain" and "finetune" in recipe.sections
        if "pretrain" in recipe.sections and recipe.section("pretrain").is_masked and not is_finetuned:
            _require_causal(section, "the model of this recipe (pretrain.objective is mlm)")
        return
    folder = Path(section.model)
    if not folder.is_dir():
        raise UsageError(f"export.model is {folder}, and there is no such folder")
    if not _is_checkpoint(folder) and not any((folder / inside / "config.json").is_file() for inside in MODEL_FOLDERS):
        inside = [folder, *folder.glob("*"), *folder.glob(".work/*/*")]  # of one run, of a stage, of a run folder
        found = [path for each in inside if each.is_dir() for path in checkpoints.list_checkpoints(each)]
        if found:
            newest = max(found, key=lambda path: (path.parent.stat().st_mtime, checkpoints.step_of(path)))
            raise UsageError(f"{folder} holds training checkpoints; give one of them, the newest is {newest}")


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Consolidates, exports, quantizes, compares, publishes."""
    import torch
    from tqdm import tqdm

    from hfscratch import serving
    from hfscratch.export import OnnxForCausalLM, folder
    from hfscratch.export.graph import require_packages

    section: ExportSection = recipe.section("export")
    makes_onnx = "onnx" in section.formats
    if makes_onnx:
        require_packages()
    inputs = source_digests(recipe, workspace)
    source = _model_folder(section, workspace)
    with _standing(source):
        manifest = _verified(source) if _is_checkpoint(source) else None
    if serving.is_classifier(source):
        raise UsageError(_not_exported(str(source)))
    if serving.is_masked(source):
        _require_causal(section, str(source))
    makes_plain = "hf" in section.formats or manifest is not None
    texts = _test_texts(workspace, section.test_bytes) if makes_onnx else []
    timings: dict[str, float] = {}
    steps = ["hf"] if makes_plain else []
    if makes_onnx:
        steps += ["graph", *section.quantized, "compare", *(["score"] if texts else []), "time"]
    metrics: dict[str, Any] = {"source": "model" if section.model else _source(section, workspace)}
    if manifest is not None:
        metrics["checkpoint"] = {"step": manifest["step"], "key": manifest["key"], **manifest["facts"]}
    proofs: list[Proof] = []
    rows: list[tuple[str, str]] = []

    with workspace.staging() as staged, tqdm(total=len(steps), desc="export", unit="step", leave=False) as bar:

        @contextlib.contextmanager
        def step(name: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            timings[name] = time.perf_counter() - started
            bar.update()

        plain = staged / "hf"
        if makes_plain:
            with step("hf"), _standing(source):
                metrics["hf"], proofs = _write_plain(source, plain, is_checkpoint=manifest is not None)
            rows = _plain_rows(metrics)
        if makes_onnx:
            model, tokenizer = serving.load_model(plain if manifest is not None else source)
            model = model.to("cpu", torch.float32)
            target = staged / "onnx"
            files, config = _write_files(model, tokenizer, section.quantized, target, step)
            # From here on the folder is used as a user would.
            opened = {
                kind: OnnxForCausalLM.from_pretrained(target, file_name=path.name) for kind, path in files.items()
            }
            probes = _probes(model, tokenizer, texts, seed=recipe.seed)
            with step("compare"):
                proofs += _compare(model, opened, probes, config)
            figures: dict[str, dict[str, Any]] = {"torch": {}}
            for kind, path in files.items():
                figures[kind] = {"file": str(path.relative_to(target)), "size_bytes": path.stat().st_size}
            if texts:
                with step("score"):
                    proofs += _score({"torch": model, **opened}, tokenizer, texts, figures)
            with step("time"):
                _time({"torch": model, **opened}, probes, figures)
            folder.write_readme(target, name=recipe.name, config=config, table=_table(figures))
            metrics |= {
                "onnx": figures,
                "test_bytes": sum(len(text.encode()) for text in texts),
                "threads": torch.get_num_threads(),
            }
            rows += _rows(figures)
        if "hf" not in section.formats:
            shutil.rmtree(plain, ignore_errors=True)  # it was only what the graph was made from
        workspace.publish(
            staged, section=to_dict(section), inputs=inputs, proofs=proofs, metrics=metrics, timings=timings
        )
    return rows


def _not_exported(what: str) -> str:
    return (
        f"{what} is a classifier, and export makes files of language models; set export.source=pretrain for its base, "
        "or leave export out (finetune/merged is a plain folder already)"
    )


def _require_causal(section: ExportSection, what: str) -> None:
    """Raises: UsageError if a masked model is to become what only causal ones can be."""
    if "onnx" in section.formats:
        raise UsageError(
            f"export.formats has onnx, whose graph writes text, and {what} guesses masked tokens; take hf, or leave "
            "export out"
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a training checkpoint: by our manifest, or by its name and the Trainer's state in it."""
    if (folder / checkpoints.MANIFEST).is_file():
        return True
    folder = folder.resolve()
    return folder in checkpoints.list_checkpoints(folder.parent) and (folder / "trainer_state.json").is_file()


def _verified(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that may be read. Raises: UsageError, saying why it must not be."""
    real = checkpoint.resolve()
    if not (checkpoint / checkpoints.MANIFEST).is_file():
        raise UsageError(
            f"{checkpoint} is a training checkpoint without {checkpoints.MANIFEST}, so another trainer wrote it or "
            "nothing says that it is whole; give one that hfscratch wrote, or a folder that save_pretrained did"
        )
    if real not in checkpoints.list_checkpoints(real.parent):
        raise UsageError(f"{checkpoint} is a training checkpoint under another name; call it checkpoint-N, N its step")
    try:
        manifest = checkpoints.verify(real)
    except checkpoints.Unusable as reason:
        raise UsageError(f"{checkpoint} is not read: {reason}; give another checkpoint") from None
    if (checkpoint / "adapter_config.json").is_file():
        raise UsageError(
            f"{checkpoint} holds an adapter, not a whole model; let `hfscratch finetune` end, and give finetune/merged"
        )
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint} has no config.json, so nothing says what its weights are; give a newer one")
    return manifest


@contextlib.contextmanager
def _standing(source: Path) -> Iterator[None]:
    """Tells a folder that was deleted meanwhile, as a run does with its older checkpoints, from other errors."""
    try:
        yield
    except Exception as error:  # whatever a library raises when its files are gone
        if source.is_dir():
            raise
        raise UsageError(f"{source} was deleted while it was read; give a newer checkpoint") from error


def _write_plain(source: Path, target: Path, *, is_checkpoint: bool) -> tuple[dict[str, Any], list[Proof]]:
    """Writes a model as a `from_pretrained` folder, opens that, and returns figures and proofs."""
    from transformers import AutoTokenizer, GenerationConfig

    from hfscratch import serving, tokens
    from hfscratch.export import consolidate

    source = serving.local_copy(source)
    if not serving.has_tokenizer(source):
        raise UsageError(f"{source} has no tokenizer; put its tokenizer.json and tokenizer_config.json there")
    masked = serving.is_masked(source)
    config = serving.load_config(source, masked=masked)
    state: dict[str, Any] = {}
    if is_checkpoint and consolidate.is_sharded(source):
        model = consolidate.empty_model(config, masked=masked)
        _require_room(4 * model.num_parameters(), target)
        state = consolidate.whole_state(source)
        consolidate.fill(model, state, source=source)
        if (source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(source))
    else:
        _require_room(sum(path.stat().st_size for path in source.glob("*.safetensors")), target)
        model = serving.load_weights(source, config, masked=masked, dtype="auto")
    model.config.use_cache = True  # the Trainer switched it off for training; a user wants it
    model.save_pretrained(str(target))
    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    if is_checkpoint:
        tokenizer.model_max_length = serving.context_of(config) or tokenizer.model_max_length
    tokens.save_tokenizer(tokenizer, target)
    figures = {
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "size_bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
    }
    return figures, _plain_proofs(target, model.state_dict() | state)


def _require_room(size_bytes: int, target: Path) -> None:
    """Raises: MachineError if memory or disk are too small for a model of that size."""
    from hfscratch.training.batch import free_memory_bytes

    artifact.make_folder(target)
    artifact.require_free_space(target, size_bytes)
    if 2 * size_bytes > free_memory_bytes():
        raise MachineError(
            f"a plain folder of this model needs about {2 * size_bytes / 1e9:.1f} GB of memory (its weights, and once "
            f"more to prove them), and {free_memory_bytes() / 1e9:.1f} GB are free"
        )


def _plain_proofs(folder: Path, state: Mapping[str, Any]) -> list[Proof]:
    """That a folder opens to the very tensors of a state, and that it has all that the model asks for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from hfscratch import serving

    def same(one: Any, other: Any) -> bool:
        return one.dtype == other.dtype and torch.equal(one, other)

    auto: Any = AutoModelForMaskedLM if serving.is_masked(folder) else AutoModelForCausalLM
    reloaded, loading = auto.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    found = reloaded.state_dict()
    equal = [name for name in state.keys() & found.keys() if same(state[name], found[name])]
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]))
    empty = [name for name, tensor in found.items() if tensor.is_meta or not tensor.numel()]
    parameters = dict(reloaded.named_parameters(remove_duplicate=False))
    num_tied = len(parameters) - len({tensor.data_ptr() for tensor in parameters.values()})
    return [
        Proof(
            "the plain folder reloads to the very tensors it was made of",
            len(equal) == len(state) == len(found),
            f"{len(equal)} of {len(state)} tensors are equal, bit for bit",
        ),
        Proof(
            "no weight is missing, and none is empty",
            not lacking and not empty and not any(folder.glob("*.bin")),
            f"{len(found)} tensors, {num_tied} of them tied to another"
            + (f"; {', '.join([*lacking, *empty][:3])}" if lacking or empty else ""),
        ),
    ]


def _plain_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures, checkpoint = metrics["hf"], metrics.get("checkpoint")
    about = f"{figures['parameters']:,} parameters, {figures['dtype']}, {figures['size_bytes'] / 1e6:.1f} MB"
    return [("hf", about + (f", of step {checkpoint['step']:,} under {checkpoint['engine']}" if checkpoint else ""))]


@dataclass(frozen=True)
class _Probes:
    """What the models are compared on.

    Attributes:
        prompts: token ids, of growing length.
        pad: the id that fills rows up.
        room: tokens that fit into the context behind the longest prompt.
    """

    prompts: list[list[int]]
    pad: int
    room: int


def _write_files(
    model: Any, tokenizer: Any, quantized: Sequence[str], target: Path, step: Callable[[str], Any]
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Fills the folder, and returns `{kind: graph file}` and what its `config.json` says."""
    from hfscratch import tokens
    from hfscratch.export import folder
    from hfscratch.export.graph import export_graph
    from hfscratch.export.quantize import KINDS, quantize
    from hfscratch.export.runtime import DEFAULT_FILE, FOLDER

    files = {"fp32": target / FOLDER / DEFAULT_FILE}
    with step("graph"):
        shape = export_graph(model, files["fp32"])
        config = folder.write_root(target, model, shape)
        tokens.save_tokenizer(tokenizer, target)
    for kind in quantized:
        files[kind] = target / FOLDER / KINDS[kind].file_name
        with step(kind):
            quantize(files["fp32"], files[kind], KINDS[kind])
    return files, config


def _compare(model: Any, opened: dict[str, Any], probes: _Probes, config: dict[str, Any]) -> list[Proof]:
    """The proofs that need no text: logits, greedy text, the label, and independence of the batch."""
    from hfscratch.export import folder, parity

    prompts, pad = probes.prompts, probes.pad
    some = prompts[-NUM_COMPARED:]
    differences = parity.logit_differences(model, opened["fp32"], some, pad)
    num_tokens = min(GREEDY_TOKENS, probes.room)
    wrong = parity.greedy_mismatches(model, opened["fp32"], prompts, pad=pad, num_tokens=num_tokens)
    by_label = folder.cache_shape_by_label(config)
    proofs = [
        Proof(
            "the ONNX graph gives torch's logits",
            all(each.holds for each in differences.values()),
            "max |Δlogit| " + "; ".join(f"{name}: {each.largest:.1e}" for name, each in differences.items()),
        ),
        Proof(
            "it writes torch's greedy text, in padded batches",
            not wrong,
            f"{len(prompts) - len(wrong)} of {len(prompts)} prompts of {len(prompts[0])} to {len(prompts[-1])} tokens, "
            f"{num_tokens} tokens each",
        ),
        Proof(
            f"the label '{config['model_type']}' gives the cache its shape",
            by_label == opened["fp32"].cache_shape,
            f"{by_label.num_layers} layers of {by_label.num_heads} heads of width {by_label.head_dim}",
        ),
    ]
    if "q8" in opened:
        moved = parity.batch_dependence(opened["q8"], some, pad)
        claim = "8-bit logits are the same alone and in a padded batch"
        proofs.append(Proof(claim, moved.holds, f"max |Δlogit| {moved.largest:.1e}"))
    return proofs


def _source(section: ExportSection, workspace: Workspace) -> str:
    if section.source != "auto":
        return section.source
    return "finetune" if artifact.read_manifest(workspace.out / "finetune") is not None else "pretrain"


def _model_folder(section: ExportSection, workspace: Workspace) -> Path:
    """Raises: UsageError, naming the command that makes it, if it is not there."""
    if section.model is not None:
        return Path(section.model)
    source = _source(section, workspace)
    folder = workspace.input(source)
    return folder / "merged" if source == "finetune" else folder


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _test_texts(workspace: Workspace, limit: int) -> list[str]:
    """Documents of the test split, in order, up to `limit` bytes; the first is cut if it alone is longer."""
    import pyarrow.parquet as pq

    chosen: list[str] = []
    size = 0
    for path in sorted((workspace.out / "data" / "data").glob("test-*.parquet")):
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
            if text and size + len(text.encode()) <= limit:
                chosen.append(text)
                size += len(text.encode())
            elif not chosen and limit:
                return [text.encode()[:limit].decode(errors="ignore")]
    return chosen


def _probes(model: Any, tokenizer: Any, texts: Sequence[str], *, seed: int) -> _Probes:
    """Prompts that begin like test documents, or else like texts that the model writes."""
    from hfscratch import serving
    from hfscratch.evaluation.likelihood import begin_token_id, encode
    from hfscratch.evaluation.sampling import sample

    begin = begin_token_id(tokenizer)
    context = serving.context_of(model.config) or PROMPT_TOKENS[1] * 8
    shortest, longest = PROMPT_TOKENS[0], max(PROMPT_TOKENS[0], min(PROMPT_TOKENS[1], context // 2))
    rows = [row for row in encode(tokenizer, list(texts)) if len(row) >= longest]
    if not rows:
        empty: list[list[int]] = [[]] * NUM_PROMPTS
        rows = sample(model, tokenizer, empty, num_tokens=longest, temperature=1.0, top_p=1.0, seed=seed)
        rows = [(list(row) * longest or [begin] * longest)[:longest] for row in rows]
    prompts = []
    for index in range(NUM_PROMPTS):
        row = rows[index % len(rows)]
        # Where documents are fewer than prompts, each prompt of a document starts at another place.
        start = index // len(rows) * longest % (len(row) - longest + 1)
        length = shortest + (longest - shortest) * index // (NUM_PROMPTS - 1)
        prompts.append([begin, *row[start : start + length - 1]])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else begin
    return _Probes(prompts, pad, context - longest)


def _score(
    models: dict[str, Any], tokenizer: Any, texts: Sequence[str], figures: dict[str, dict[str, Any]]
) -> list[Proof]:
    """Bits per byte of every file beside torch's, into `figures`, and the proof for the 8-bit one."""
    from hfscratch.evaluation.likelihood import score_texts

    for kind, model in models.items():
        figures[kind]["bits_per_byte"] = score_texts(model, tokenizer, texts).bits_per_byte
        figures[kind]["lost"] = figures[kind]["bits_per_byte"] / figures["torch"]["bits_per_byte"] - 1
    if "q8" not in figures:
        return []
    evidence = "; ".join(f"{kind}: {each['bits_per_byte']:.4f} ({each['lost']:+.3%})" for kind, each in figures.items())
    claim = f"8-bit weights lose less than {MOST_LOST:.1%} of bits per byte"
    return [Proof(claim, figures["q8"]["lost"] < MOST_LOST, evidence)]


def _time(models: dict[str, Any], probes: _Probes, figures: dict[str, dict[str, Any]]) -> None:
    """Tokens a second of every file, into `figures`: in turns, and the best of them, because machines are shared."""
    from hfscratch.export.parity import tokens_per_second

    num_tokens = min(SPEED_TOKENS, probes.room)
    for _ in range(SPEED_TURNS):
        for kind, model in models.items():
            speed = tokens_per_second(model, probes.prompts[0], pad=probes.pad, num_tokens=num_tokens)
            figures[kind]["tokens_per_s"] = max(speed, figures[kind].get("tokens_per_s", 0.0))


def _table(figures: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for kind, each in figures.items():
        if "file" not in each:
            continue
        row = {"file": f"`{each['file']}`", "weights": kind, "MB": f"{each['size_bytes'] / 1e6:.2f}"}
        if "bits_per_byte" in each:
            row["bits per byte"] = f"{each['bits_per_byte']:.4f} ({each['lost']:+.2%} against torch)"
        rows.append(row | {"tokens/s, one at a time": f"{each['tokens_per_s']:,.0f}"})
    return rows


def _rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for each in figures.values():
        parts = [f"{each['size_bytes'] / 1e6:.1f} MB"] if "size_bytes" in each else []
        if "bits_per_byte" in each:
            parts.append(f"{each['bits_per_byte']:.4f} bits per byte")
        rows.append((each.get("file", "torch"), ", ".join([*parts, f"{each['tokens_per_s']:,.0f} tokens/s"])))
    return rows
