"""The command line: verbs, what they print, and the only place where errors become sentences and exit codes.

It imports nothing heavy until a verb runs, so that `hfscratch --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hfscratch import __version__
from hfscratch.errors import STOP_SIGNALS, DataError, HfscratchError, MachineError, Terminated, UsageError
from hfscratch.training import processes

DESCRIPTION = "From raw text to a language model of your own that every Hugging Face tool can load."
EPILOG = """\
A recipe is one YAML file, or the name of one that comes with hfscratch (pycode-tiny). Its sections are the stages.
Any value can be set behind it:  hfscratch run pycode-tiny pretrain.max_tokens=200000 out=runs/short

  hfscratch run pycode-tiny          the whole line, on the Python sources of this machine
  hfscratch init my_docs/            a recipe for your own text, sized to it and to this machine
  hfscratch data --help              what a stage does, and every key of its section

exit codes: 0 done · 2 bad usage, recipe, path or model · 3 bad data · 4 a proof failed · 5 the machine cannot
(dependency, network, space, permission) · 1 a bug of ours · 130 Ctrl-C · 143 SIGTERM
"""
STAGE_HELP = {
    "data": "read, normalise, deduplicate and split raw text",
    "tokenizer": "train a tokenizer and turn the text into token ids",
    "pretrain": "train a model from random weights, or go on from a checkpoint's",
    "finetune": "teach the model a task: docstrings for functions, or instructions (needs the extra 'finetune')",
    "evaluate": "score the model on text it never saw",
    "export": "write the model for other runtimes: ONNX (needs the extra 'export'); or a checkpoint as a plain folder",
    "push": "publish the model on the Hub, privately unless told otherwise; `run` never does",
}

TAKE_A_MODEL = {"evaluate": "any model folder", "export": "any model folder or training checkpoint"}
"""What verbs take in place of a recipe."""

DISK_FULL = ("No space left on device", "os error 28", "File too large", "os error 27")
"""How libraries that raise exceptions of their own (safetensors, tokenizers, pyarrow) say it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for each in STOP_SIGNALS:
        signal.signal(each, _terminate)
    if "ACCELERATE_USE_CPU" in os.environ and "RANK" not in os.environ:  # its launcher of one process sets it
        processes.stop_with_launcher()
    try:
        arguments = _parse(argv)
        _prepare()
        return arguments.command(arguments)
    except HfscratchError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        # Under `python -m`, CPython ends with the signal instead of our code if it arrived inside an exec(); an exec
        # that ends well makes it forget.
        exec("")
        return _fail("interrupted; the same command goes on from the last finished stage or checkpoint", 130)
    except Exception as error:
        known = _machine_error(error)
        if known is None:
            raise
        return _fail(str(known), known.exit_code)


def _fail(message: str, exit_code: int) -> int:
    """Says what is wrong; under a launcher, what all processes would say is said by the first."""
    if exit_code == Terminated.exit_code:  # launchers and schedulers say it twice, and the second comes while it ends
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or exit_code not in (UsageError.exit_code, DataError.exit_code):
        print(f"hfscratch: {message}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
    return exit_code


def _print(text: str = "", end: str = "\n") -> None:
    """Prints at once; a reader that has gone (`| head`) is no error."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: Any) -> None:
    at = frame
    while at is not None:
        if at.f_code.co_name == "__del__":  # Python drops what is raised there: once more, a moment later
            again = threading.Timer(0.01, os.kill, (os.getpid(), signum))
            again.daemon = True
            again.start()
            return
        at = at.f_back
    name = signal.Signals(signum).name
    raise Terminated(f"stopped by {name}; the same command goes on from the last finished stage or checkpoint")


def _machine_error(error: Exception) -> MachineError | None:
    """What the machine could not do, where a library says so in its own words; None for anything else."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("hfscratch"):
        package = error.name.split(".")[0]
        return MachineError(f"the package '{package}' is not installed; run: pip install 'hfscratch' (see README.md)")
    if isinstance(error, MemoryError):
        return MachineError("out of memory; set a smaller model.depth, pretrain.batch_tokens or data.workers")
    text = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(words in text for words in DISK_FULL):
        return MachineError("the disk is full; what was being written has been dropped, what was finished stands")
    if "PytorchStreamWriter failed" in text or ("inline_container" in text and "write" in text):
        return MachineError("a file could not be written, most likely because the disk is full")
    if processes.is_lost(error):
        return MachineError("another process of this run has ended; what it said tells why")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        name = error.filename if isinstance(error, OSError) else None
        return MachineError(f"no permission to use {name or 'a file'} ({os.strerror(code)})")
    if "out of memory" in text.lower() and type(error).__name__ == "OutOfMemoryError":
        return MachineError("the GPU is out of memory; set a smaller model.depth or pretrain.sequence_length")
    return None


def _prepare() -> None:
    """Quiet libraries, our own log on stderr (rank 0 only), before any of them is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP's threads spin for milliseconds while they wait for each other: with one other busy program on a small
    # machine, training was measured 15 times slower (docs/log.md). A short spin costs nothing on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # DeepSpeed still calls what torch has renamed; a warning a step and a process would bury what is to be read.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*is deprecated", FutureWarning)
    # On a machine without a GPU it is right that DeepSpeed takes the processor.
    logging.getLogger("DeepSpeed").addFilter(lambda said: "Setting accelerator to CPU" not in said.getMessage())
    log = logging.getLogger("hfscratch")
    log.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


# ---------------------------------------------------------------------------------------------------------------------
# The parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command; `key=value` words, and the prompt of generate, may stand before or behind options."""
    parser = _parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    if getattr(arguments, "prompt", None) == "" and len(rest) == 1 and not rest[0].startswith("-"):
        arguments.prompt = rest.pop()  # argparse takes an optional word only right behind the word before it
    foreign = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if foreign:
        parser.error(f"unrecognized arguments: {' '.join(foreign)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfscratch", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"hfscratch {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    asked = argv[0] if {"-h", "--help"} & set(argv) else None

    init = verbs.add_parser("init", help="write a recipe for your own text, sized to it and to this machine")
    init.add_argument("path", help="a folder or file of text: .txt .md .py .jsonl(.gz) .parquet")
    init.add_argument("--output", "-o", type=Path, help="where to write the recipe (default: NAME.yaml here)")
    init.add_argument(
        "--minutes", type=float, default=10.0, help="how long `run` may take on this machine (default: 10)"
    )
    init.add_argument("--text-column", help="the column that holds the text, for .jsonl and .parquet")
    init.add_argument("--force", action="store_true", help="replace a recipe that stands there")
    init.set_defaults(command=_init)

    run = verbs.add_parser("run", help="all stages of a recipe but push, skipping those that are fresh")
    _add_recipe(run)
    run.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and those after it again")
    run.set_defaults(command=_run, stage=None)

    for stage, text in STAGE_HELP.items():
        about: dict[str, Any] = _stage_help(stage) if stage == asked else {}
        verb = verbs.add_parser(
            stage,
            help=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **about,
        )
        _add_recipe(verb, or_model=TAKE_A_MODEL.get(stage))
        verb.set_defaults(command=_run, stage=stage, start=None)
        if stage == "data":
            verb.add_argument(
                "--explain",
                metavar="ID_OR_TEXT",
                help="tell what became of a document, named by its id, by the end of it, by its text or by a file that "
                "holds that, and do nothing else",
            )
            verb.set_defaults(command=_data)

    generate = verbs.add_parser("generate", help="continue a prompt with a model folder, or talk with it")
    generate.add_argument(
        "model", help="a model folder (ONNX too), a run folder (its pretrain, with --chat finetune/merged), or a Hub id"
    )
    generate.add_argument("prompt", nargs="?", default="", help="the text to continue (default: none)")
    generate.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt through the model's chat template; without a prompt, talk with it line by line",
    )
    generate.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=0.95, metavar="P")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument("--trust-remote-code", action="store_true", help="run the code inside a foreign model folder")
    generate.set_defaults(command=_generate)
    return parser


def _add_recipe(verb: argparse.ArgumentParser, *, or_model: str | None = None) -> None:
    about = "a YAML file, or the name of a recipe that comes with hfscratch"
    verb.add_argument("recipe", help=about + (f"; or {or_model} (then give out=DIR too)" if or_model else ""))
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace or add to the recipe's")
    verb.add_argument("--force", action="store_true", help="run again even if nothing has changed")


def _stage_help(stage: str) -> dict[str, str]:
    """The stage's docstring and every key of its sections, with default and meaning."""
    from hfscratch import pipeline
    from hfscratch.recipe import field_docs, key_of

    module = pipeline.stage_module(stage)
    lines: list[str] = []

    def describe(cls: type, prefix: str) -> None:
        docs, hints = field_docs(cls), typing.get_type_hints(cls)
        for each in dataclasses.fields(cls):
            if "names" in each.metadata:
                owner = (
                    "transformers.TrainingArguments"
                    if prefix in ("pretrain", "finetune")
                    else "the type's own configuration"
                )
                lines.append(f"  {prefix}.…: any other field of {owner}")
                continue
            hint = hints[each.name]
            nested: list[tuple[Any, str]] = []
            for kind in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(kind):
                    nested.append((kind, "[]" if typing.get_origin(hint) is list else ""))
                elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
                    nested.append((typing.get_args(kind)[1], ".NAME"))
            default = (
                f" (default: {json.dumps(each.default)})" if isinstance(each.default, str | int | float | None) else ""
            )
            about = f"{docs.get(each.name, '')}{default}"
            head = f"  {prefix}.{key_of(each)}: "
            lines.extend(textwrap.wrap(about, 110, initial_indent=head, subsequent_indent="      ") or [head])
            for kind, suffix in nested:
                describe(kind, f"{prefix}.{each.name}{suffix}")

    for name, cls in module.SECTIONS.items():
        describe(cls, name)
    return {"description": module.__doc__ or "", "epilog": "keys:\n" + "\n".join(lines)}


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def _run(arguments: argparse.Namespace) -> int:
    from hfscratch import pipeline, recipe

    started = time.perf_counter()
    model_for = arguments.stage if arguments.stage in TAKE_A_MODEL else None
    loaded = recipe.load(arguments.recipe, pipeline.sections(), arguments.overrides, model_for=model_for)
    stages = [arguments.stage] if arguments.stage else None
    results = pipeline.run(loaded, stages, force=arguments.force, start=arguments.start)
    if int(os.environ.get("RANK", 0)) != 0:
        return 0
    report = loaded.out / "report.html"
    if not pipeline.is_report_fresh(loaded.out):
        from hfscratch import reporting

        reporting.write(loaded.out)
        pipeline.note_report(loaded.out)
    for result in results:
        _print(
            f"{result.stage}: " + ("fresh, nothing to do" if result.was_fresh else f"done in {_time(result.seconds)}")
        )
        if arguments.stage:
            _print_table(result.rows)
    if not arguments.stage:
        _print_summary(loaded.out, arguments.recipe, time.perf_counter() - started)
    _print(f"report: {report}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    if arguments.explain is None:
        return _run(arguments)
    from hfscratch import artifact, pipeline, recipe
    from hfscratch.data import ledger
    from hfscratch.stages import data

    loaded = recipe.load(arguments.recipe, pipeline.sections(), arguments.overrides)
    folder = loaded.out / "data"
    manifest = artifact.read_manifest(folder)
    if manifest is None:
        raise UsageError(f"there is no {folder} yet; make it with: hfscratch data {arguments.recipe}")
    for line in ledger.explain(folder, arguments.explain, data.normalisation(manifest["section"]["normalise"])):
        _print(line)
    return 0


def _print_summary(out: Path, recipe_name: str, seconds: float) -> None:
    """The table, the proofs, the samples and the next commands: what stands in the run folder, whoever made it."""
    from hfscratch import pipeline, recipe, reporting

    manifests = pipeline.manifests(out)
    notes = reporting.outdated(manifests)
    manifests = {stage: manifest for stage, manifest in manifests.items() if stage not in notes}
    rows: list[tuple[str, str]] = []
    if "data" in manifests:
        metrics = manifests["data"]["metrics"]
        for split, count in metrics["documents"].items():
            rows.append((f"documents, {split}", f"{count:,} ({metrics['bytes'][split] / 1e6:.2f} MB)"))
    if "tokenizer" in manifests:
        metrics = manifests["tokenizer"]["metrics"]
        rows.append(
            (
                "vocabulary",
                f"{metrics['vocab_size']:,} entries, {metrics['bytes_per_token']['train']:.2f} bytes a token",
            )
        )
    if "pretrain" in manifests:
        metrics = manifests["pretrain"]["metrics"]
        size = sum(entry["size_bytes"] for entry in manifests["pretrain"]["files"].values())
        rows.append(("parameters", f"{metrics['parameters']:,} ({size / 1e6:.1f} MB on disk)"))
        rows.append(("trained on", f"{metrics['train_tokens']:,} tokens, {metrics['precision']}"))
        rows.append(("speed", f"{metrics['tokens_per_s']:,.0f} tokens/s, {_time(metrics['train_seconds'])}"))
    if "evaluate" in manifests:
        scores = json.loads((out / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
        rows += _scores(scores)
    if "finetune" in manifests:
        metrics = manifests["finetune"]["metrics"]
        used = metrics["examples"]["train"]["used"]
        about = f"{metrics['task']} by {metrics['method']}, {used:,} examples, {metrics['steps']:,} steps"
        rows.append(("finetuned", f"{about}, {_time(metrics['train_seconds'])}"))
    if "export" in manifests:
        metrics = manifests["export"]["metrics"]
        if "hf" in metrics:
            rows.append(("plain folder", f"{metrics['hf']['size_bytes'] / 1e6:.1f} MB, {metrics['hf']['dtype']}"))
        for kind, figures in metrics.get("onnx", {}).items():
            if kind != "torch":
                lost = f", {figures['lost']:+.3%} bits per byte" if "lost" in figures else ""
                speed = f", {figures['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in figures else ""
                rows.append((f"onnx, {kind}", f"{figures['size_bytes'] / 1e6:.1f} MB{lost}{speed}"))
    _print()
    _print_table(rows)
    for note in notes.values():
        _print(f"  {note}")
    _print("\nproofs")
    for stage, manifest in manifests.items():
        for proof in manifest["proofs"]:
            _print(f"  {'holds ' if proof['holds'] else 'FAILED'}  {stage}: {proof['claim']} ({proof['evidence']})")
    if "evaluate" in manifests:
        samples = json.loads((out / "evaluate" / "samples.json").read_text(encoding="utf-8"))
        for number, sample in enumerate(samples[:3], 1):
            _print(f"\nsample {number}")
            text = sample["prompt"] + sample["text"] if "prompt" in sample else sample["text"]
            _print(textwrap.indent("\n".join(text.strip("\n").splitlines()[:12]), "  | ", lambda line: True))
    _print(f"\nthis run: {_time(seconds)}")
    if "finetune" in manifests and manifests["finetune"]["metrics"].get("labels"):
        merged = out / "finetune" / "merged"
        _print(f'try it:         transformers.pipeline("text-classification", "{merged}"), after `import hfscratch`')
    elif "pretrain" in manifests and manifests["pretrain"]["metrics"].get("objective") == "mlm":
        _print(f'try it:         transformers.pipeline("fill-mask", "{out / "pretrain"}"), after `import hfscratch`')
    elif "pretrain" in manifests:
        _print(f"try it:         hfscratch generate {out / 'pretrain'} {shlex.quote(_prompt(out, manifests))}")
    if recipe_name in recipe.shipped_recipes():
        _print("your own text:  hfscratch init my_docs/ && hfscratch run my_docs.yaml")


def _prompt(out: Path, manifests: dict[str, Any]) -> str:
    """A beginning that the model may know: of a function, or the first words of a text that it was sampled with."""
    if "evaluate" not in manifests or "parses" in manifests["evaluate"]["metrics"].get("pretrain", {}):
        return "def "
    samples = json.loads((out / "evaluate" / "samples.json").read_text(encoding="utf-8"))
    prompts = [" ".join(sample["prompt"].split()[:3]) for sample in samples]
    return next((prompt for prompt in prompts if prompt), "Once upon a time")


def _scores(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of evaluate's metrics.json: splits first, then answers, the models side by side."""
    from hfscratch.stages.evaluate import LABELS, READINGS

    rows = []
    models = {model: each for model, each in scores.items() if isinstance(each, dict)}
    for split in ("validation", "test", "dataset"):
        for name, unit in READINGS.items():
            found = [
                f"{each[split][name]:.3f} ({model})" for model, each in models.items() if name in each.get(split, {})
            ]
            if found:
                rows.append((f"{unit}, {split}", ", ".join(found)))
    for model, each in models.items():
        if "parses" in each:
            parses = each["parses"]
            cut, of = parses["reference_share"], f"of {parses['num_references']} documents cut alike"
            shares = f"{parses['share']:.1%} of {parses['num_samples']} samples"
            rows.append(("parses as Python", f"{shares} ({model})" + (f"; {cut:.1%} {of}" if cut is not None else "")))
    answers = {model: each["answers"] for model, each in models.items() if "answers" in each}
    for name in next(iter(answers.values()), {}):
        found = [f"{each[name]['value']:.3f} ({model.replace('_', ' ')})" for model, each in answers.items()]
        rows.append((f"{'labels' if name in LABELS else 'answers'}, {name}", ", ".join(found)))
    return rows


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in rows), default=0)
    for label, value in rows:
        _print(f"  {label:<{width}}  {value}")


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _init(arguments: argparse.Namespace) -> int:
    from hfscratch import init

    written = init.write_recipe(
        arguments.path,
        output=arguments.output,
        minutes=arguments.minutes,
        text_column=arguments.text_column,
        force=arguments.force,
    )
    _print(written.summary)
    _print(f"\nwrote {written.path}; look at it, then:  hfscratch run {written.path}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from hfscratch import serving

    if arguments.system is not None and not arguments.chat:
        raise UsageError("--system is for a conversation; add --chat")
    folder = Path(arguments.model)
    if arguments.chat and (folder / "finetune" / "merged" / "config.json").is_file():
        folder = folder / "finetune" / "merged"  # of a run folder, the model that learnt to answer
    name = str(folder) if folder.is_dir() else arguments.model
    model, tokenizer = serving.load_model(name, trust_remote_code=arguments.trust_remote_code)

    def write(prompt: str | list[dict[str, str]]) -> str:
        pieces = []
        for piece in serving.stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        ):
            _print(piece, end="")
            pieces.append(piece)
        _print()
        return "".join(pieces)

    if not arguments.chat:
        _print(arguments.prompt, end="")
        write(arguments.prompt)
        return 0
    messages = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
    serving.chat_ids(tokenizer, [*messages, {"role": "user", "content": arguments.prompt}])  # before anyone types
    if arguments.prompt:
        write([*messages, {"role": "user", "content": arguments.prompt}])
        return 0
    _converse(model, tokenizer, messages, write)
    return 0


def _converse(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], write: Callable[[list[dict[str, str]]], str]
) -> None:
    """Reads one turn a line from stdin and answers it, until the end of the input."""
    from hfscratch import serving

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _print("one line is one turn; Ctrl-D ends")
    told = len(messages)
    context = serving.context_of(model.config)
    while True:
        if is_terminal:
            _print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            break
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        forgotten = 0
        while (
            context is not None
            and len(messages) > told + 1
            and len(serving.chat_ids(tokenizer, messages)) > context // 2
        ):
            del messages[told : told + 2]
            forgotten += 2
        if forgotten:
            logging.getLogger("hfscratch").info(
                "the first %d turns no longer fit beside an answer into the model's %d tokens and are forgotten",
                forgotten,
                context,
            )
        try:
            answer = write(messages)
        except UsageError as error:  # a line longer than the model can read is no reason to end
            logging.getLogger("hfscratch").warning("%s", error)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
    if is_terminal:
        _print()
