"""push: publishes the finished model on the Hub.

Sends the model folder (weights, configuration, code, tokenizer), a model card with the measured figures, and the ONNX
files under `onnx/`, in one commit: the repository holds all of it or nothing. Nothing else leaves the machine: no
manifest, no recipe, no training state; `push.dry_run=true` lists what would be sent and writes the card to
`<out>/.work/push/README.md`, without network or login.
Interrupted, the same command sends what is still missing. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.

Writes `<out>/push/`: the card as it was sent, `files.json`, and a manifest that says where it went. Adapters, datasets
and other branches than main are not covered.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import MachineError, ProofFailed, UsageError
from hfscratch.recipe import Recipe, to_dict

logger = logging.getLogger(__name__)

INPUTS = ()
"""None that every run has: `source_digests` says which artifacts are read."""
VERSION = 1
TOLD = ("data", "tokenizer", "pretrain", "finetune", "evaluate", "export")
"""Artifacts whose figures the card tells."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)
"""What `from_pretrained` reads of a model folder; nothing else of it is sent."""
ONNX_FILES = (
    "*.onnx",
    "*.onnx_data*",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class PushSection:
    """Where the model goes, who sees it, and what its card says beyond the figures."""

    repo_id: str
    """NAME/MODEL on the Hub; NAME is you or an organization of yours."""

    source: Literal["auto", "pretrain", "finetune"] = "auto"
    """Whose model; auto takes the finetuned one if there is one."""

    private: bool = True
    """Whether only you (or the organization) can see a repository that is made now."""

    dry_run: bool = False
    """List what would be sent, write the card where it can be read, and stop; needs neither network nor login."""

    onnx: bool = True
    """Whether the ONNX files go along, under onnx/, if there are any."""

    commit_message: str | None = None
    """What the repository's history says; `Upload NAME with hfscratch` if not given."""

    license: str | None = None
    """Of the model, as the Hub writes licences (apache-2.0); the card says that none was chosen if not given."""

    language: tuple[str, ...] = ()
    """Languages of the text, by ISO code (en); `code` if not given and the text is python-stdlib alone."""

    tags: tuple[str, ...] = ()
    """More words to be found by."""

    base_model: str | None = None
    """The Hub id of the model that `finetune.base` is a copy of."""

    def __post_init__(self) -> None:
        from hfscratch.hub.upload import check_repo_id

        check_repo_id(self.repo_id)
        if "/" not in self.repo_id:
            raise UsageError(f"repo_id is '{self.repo_id}', which does not say whose; give NAME/MODEL")
        if self.base_model is not None:
            try:
                check_repo_id(self.base_model)
            except UsageError as error:
                raise UsageError(str(error).replace("repo_id", "base_model", 1)) from None
        if self.commit_message is not None and not self.commit_message.strip():
            raise UsageError("commit_message is empty; leave it out for the usual one")


SECTIONS = {"push": PushSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change what stands on the Hub, and which Hub."""
    from hfscratch.hub.upload import endpoint

    fields = {name: value for name, value in to_dict(recipe.section("push")).items() if name != "commit_message"}
    return {**fields, "name": recipe.name, "endpoint": endpoint()}


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """The digests of the model, of the ONNX files, and of what the card tells."""
    manifests = _manifests(workspace.out)
    source = _source(recipe.section("push"), manifests)
    told, _ = _related(manifests, source)
    return {stage: manifest["digest"] for stage, manifest in told.items()}


def fresh_rows(workspace: Workspace) -> list[tuple[str, str]]:
    """The table of a push that has nothing to do: where the model stands."""
    manifest = artifact.read_manifest(workspace.final)
    return _rows(manifest["metrics"]) if manifest else []


def check(recipe: Recipe) -> None:
    """Raises: MachineError if huggingface_hub is too old."""
    import huggingface_hub

    version = huggingface_hub.__version__
    if int(version.split(".")[0]) < 1:
        raise MachineError(
            f"push needs huggingface_hub 1 or later, and {version} is installed; run it where transformers 5 is"
        )


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Lists, checks, logs in, sends, reads back, publishes."""
    from hfscratch.hub import upload

    section: PushSection = recipe.section("push")
    started = time.perf_counter()
    manifests = _manifests(workspace.out)
    source = _source(section, manifests)
    folder = workspace.input(source)
    if source == "finetune":
        folder = folder / "merged"
    told, untold = _related(manifests, source)
    graphs = _onnx_files(section, workspace, manifests, source)
    files = [upload.Outgoing(path.name, path) for path in _model_files(folder)]
    files += [upload.Outgoing(name, path) for name, path in graphs.items()]
    text = _card(recipe, workspace, folder, told, untold, files)
    files.insert(0, upload.Outgoing("README.md", text.encode()))
    private = _paths_proof(files, workspace.out)
    listing = _listing(files)
    if section.dry_run:
        _require(private)
        target = f"{upload.endpoint()}/{section.repo_id}, {'private' if section.private else 'public'} if it is new"
        artifact.make_folder(workspace.work)
        shown = workspace.work / "README.md"
        artifact.write_text(shown, text)
        return [("would go to", target), *listing, ("the card, to read", str(shown))]
    logger.info("push will send:\n%s", "\n".join(f"  {name:<40} {size}" for name, size in listing))
    _require(private)

    with upload.hub_errors(section.repo_id):
        upload.log_in()
        message = section.commit_message or f"Upload {recipe.name} with hfscratch"
        sent = upload.send(files, section.repo_id, is_private=section.private, message=message)
    held = "; ".join(sent.differences) or f"{len(files)} files by name, size and digest at commit {sent.commit[:12]}"
    metrics = {
        "repo_id": sent.repo_id,
        "url": sent.url,
        "commit": sent.commit,
        "private": sent.is_private,
        "source": source,
        "num_files": len(files),
        "size_bytes": sum(file.size_bytes for file in files),
        "unchanged": sent.unchanged,
        "replaced": sent.replaced,
        "deleted": sent.deleted,
        "kept": sent.kept,
    }
    with workspace.staging() as staged:
        artifact.write_text(staged / "README.md", text)
        listed = {file.name: {"size_bytes": file.size_bytes, "sha256": file.sha256} for file in files}
        artifact.write_json(staged / "files.json", listed)
        workspace.publish(
            staged,
            section=to_dict(section),
            inputs=source_digests(recipe, workspace),
            proofs=[private, Proof("the repository holds what was sent", not sent.differences, held)],
            metrics=metrics,
            timings={"push": time.perf_counter() - started},
        )
    return _rows(metrics)


# ---------------------------------------------------------------------------------------------------------------------
# What belongs together


def _manifests(out: Path) -> dict[str, dict[str, Any]]:
    found = {stage: artifact.read_manifest(out / stage) for stage in TOLD}
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def _source(section: PushSection, manifests: Mapping[str, Any]) -> str:
    if section.source != "auto":
        return section.source
    return "finetune" if "finetune" in manifests else "pretrain"


def _related(manifests: Mapping[str, dict[str, Any]], source: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The artifacts that `source` was made of or that were made of it, and the names of those that contradict it.

    An artifact that was made anew since, or of another model, has no place in the card.
    """
    told: dict[str, dict[str, Any]] = {}
    waiting = [source] if source in manifests else []
    while waiting:
        stage = waiting.pop()
        told[stage] = manifests[stage]
        for name, digest in manifests[stage]["inputs"].items():
            if name in manifests and name not in told and manifests[name]["digest"] == digest:
                waiting.append(name)
    for stage in ("evaluate", "export"):
        manifest = manifests.get(stage, {"section": {}, "inputs": {}})
        read = {name: digest for name, digest in manifest["inputs"].items() if name in manifests}
        if manifest["section"].get("model") or not any(
            name in told for name in read if name in ("pretrain", "finetune")
        ):
            continue  # of some other model
        if manifest["section"].get("dataset"):
            read.pop("data", None)  # it has text or questions of its own
        if "pretrain" not in told:
            read.pop("pretrain", None)  # scored beside a finetuned foreign base
        if all(name in told and digest == told[name]["digest"] for name, digest in read.items()):
            told[stage] = manifests[stage]
    untold = [stage for stage in TOLD if stage in manifests and stage not in told]
    if source == "pretrain":
        untold = [stage for stage in untold if stage != "finetune"]  # another model, not a contradiction
    return {stage: told[stage] for stage in TOLD if stage in told}, untold


def _model_files(folder: Path) -> Iterator[Path]:
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    yield from (path for path in found if any(path.match(pattern) for pattern in MODEL_FILES))


def _onnx_files(
    section: PushSection, workspace: Workspace, manifests: Mapping[str, Any], source: str
) -> dict[str, Path]:
    """`{name in the repository: file}`: the graphs and, beside them, the configuration that is labelled for them.

    Raises: UsageError if they were made of another model.
    """
    exported = manifests.get("export", {})
    if not section.onnx or "onnx" not in exported.get("metrics", {}):
        return {}
    if exported["inputs"].get(source) != manifests.get(source, {}).get("digest"):
        raise UsageError(
            f"{workspace.out / 'export'} was made of another model than {workspace.out / source}; run `hfscratch "
            "export RECIPE` again, or set push.onnx=false"
        )
    folder = workspace.input("export") / "onnx"
    found = {}
    for root in (folder, folder / "onnx"):
        for path in sorted(root.iterdir()):
            if path.is_file() and any(path.match(pattern) for pattern in ONNX_FILES):
                found[f"onnx/{path.name}"] = path
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def _card(
    recipe: Recipe,
    workspace: Workspace,
    folder: Path,
    told: Mapping[str, Any],
    untold: Sequence[str],
    files: Sequence[Any],
) -> str:
    from hfscratch.hub import card

    section: PushSection = recipe.section("push")
    data_card = workspace.out / "data" / "README.md"
    labelled = next((file.content for file in files if file.name == "onnx/config.json"), None)
    return card.make_card(
        name=recipe.name,
        repo_id=section.repo_id,
        source=_source(section, _manifests(workspace.out)),
        manifests=told,
        untold=untold,
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        chat_template=_chat_template(folder),
        data_card=data_card.read_text(encoding="utf-8") if "data" in told and data_card.is_file() else "",
        files={file.name: file.size_bytes for file in files},
        onnx_type=json.loads(labelled.read_text(encoding="utf-8"))["model_type"] if labelled else None,
        license=section.license,
        language=section.language,
        tags=section.tags,
        base_model=section.base_model,
    )


def _chat_template(folder: Path) -> bool:
    """Whether the tokenizer brings one, in a file of its own or in its configuration."""
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _listing(files: Sequence[Any]) -> list[tuple[str, str]]:
    from hfscratch.hub import card

    rows = [(file.name, card.size(file.size_bytes)) for file in files]
    return [*rows, (f"{len(files)} files", card.size(sum(file.size_bytes for file in files)))]


def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    from hfscratch.hub import card

    rows = [
        ("stands at", f"{metrics['url']} ({'private' if metrics['private'] else 'public'})"),
        ("commit", metrics["commit"]),
        (
            "files",
            f"{metrics['num_files']} of {card.size(metrics['size_bytes'])}, {len(metrics['unchanged'])} were there",
        ),
    ]
    for name in ("replaced", "deleted", "kept"):
        if metrics[name]:
            rows.append((name, ", ".join(metrics[name])))
    return rows


def _require(proof: Proof) -> None:
    if not proof.holds:
        raise ProofFailed(f"push: the proof '{proof.claim}' failed: {proof.evidence}; nothing was sent")


def _paths_proof(files: Sequence[Any], out: Path) -> Proof:
    """That no file names a folder of this machine: where the run lies, the current one, home, temporary, the package.

    A path of one part (`/root`, `/tmp`) tells nothing of a machine, and stands in many texts that are learnt.
    """
    places = {out.resolve(), Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(__file__).parents[1]}
    needles = [str(place).encode() for place in places if len(place.parts) > 2]
    found = [file.name for file in files if _holds(file.content, needles)]
    return Proof(
        "no file that is sent names a folder of this machine",
        not found,
        ", ".join(found) if found else f"{len(needles)} folders looked for in {len(files)} files",
    )


def _holds(content: Path | bytes, needles: Sequence[bytes]) -> bool:
    if isinstance(content, bytes):
        return any(needle in content for needle in needles)
    overlap = max(map(len, needles), default=1) - 1
    before = b""
    with content.open("rb") as file:
        while block := file.read(1 << 24):
            window = before + block
            if any(needle in window for needle in needles):
                return True
            before = window[-overlap:] if overlap else b""
    return False
