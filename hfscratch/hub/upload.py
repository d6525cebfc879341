"""Sends files to a model repository on the Hub: all of them in one commit, or nothing.

Large files go first, each as a blob that no name points to yet; then a single commit names them all. What breaks off
before that leaves the repository as it was, and the blobs that have arrived are not sent again. The protocol, Xet
included, is huggingface_hub's; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there.

Only model repositories and their main branch are covered.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfscratch.artifact import digest_file
from hfscratch.errors import HfscratchError, MachineError, UsageError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 60.0
"""The longest that the Hub may say nothing; huggingface_hub itself would wait for ever."""
SMALL_BYTES = 1_000_000
LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "configuration_*.py",
    "modeling_*.py",
    "pytorch_model*",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)
"""Names at a repository's root that loading picks up. One that an earlier upload left there, and this one does not
bring, would mix two models."""
ONNX = "onnx/"
"""The folder that belongs to the ONNX graphs, whole."""


@dataclass(frozen=True)
class Outgoing:
    """A file to send.

    Attributes:
        name: its path in the repository.
        content: the bytes, or the file that holds them.
    """

    name: str
    content: Path | bytes

    @functools.cached_property
    def size_bytes(self) -> int:
        """How long it is."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @functools.cached_property
    def sha256(self) -> str:
        """What the Hub calls a large file."""
        return (
            hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else digest_file(self.content)
        )

    @functools.cached_property
    def git_oid(self) -> str:
        """What git, and so the Hub, calls a small file."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Remote:
    """A file as a repository lists it: by its sha256 if it is a large one, by git's name for it otherwise."""

    size_bytes: int
    git_oid: str
    sha256: str | None

    def is_same(self, file: Outgoing) -> bool:
        """Whether it holds these bytes."""
        if self.size_bytes != file.size_bytes:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.git_oid == file.git_oid


@dataclass(frozen=True)
class Sent:
    """What a push did to a repository.

    Attributes:
        repo_id: its full name.
        url: where a browser finds it.
        commit: the commit that now holds the files; the one that stood there if nothing had changed.
        is_private: whether only its owners see it.
        unchanged: names that stood there with these very bytes.
        replaced: names that stood there with other bytes.
        deleted: names that an earlier upload left and a load would have picked up.
        kept: other names, which were left alone.
        differences: what the repository now holds that was not sent so; empty if all is well.
    """

    repo_id: str
    url: str
    commit: str
    is_private: bool
    unchanged: tuple[str, ...]
    replaced: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    differences: tuple[str, ...]


def check_repo_id(repo_id: str) -> None:
    """Raises: UsageError if the Hub could have no repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).split(":")[0].rstrip(".")
        raise UsageError(
            f"repo_id is '{repo_id}', which is no name on the Hub ({reason[:1].lower()}{reason[1:]}); give NAME/MODEL"
        ) from None


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Says in one sentence what the Hub, or the way to it, refused; and does not wait for a Hub that says nothing.

    Raises: UsageError for a card that the Hub does not accept; MachineError for whatever else it refuses, for no
    network, no login and no right to write.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def impatient_client() -> Any:
        client = default_client_factory()
        client.timeout = (CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S, SILENCE_TIMEOUT_S, SILENCE_TIMEOUT_S)
        return client

    set_client_factory(impatient_client)
    try:
        # Its own retries would otherwise be told of one by one.
        with _quiet(logging.getLogger("huggingface_hub")):
            yield
    except HfscratchError:
        raise
    except Exception as error:
        said = _said(error, repo_id)
        if said is None:
            raise
        raise said from error
    finally:
        set_client_factory(default_client_factory)


def log_in() -> None:
    """Asks the Hub who this machine's token is. Raises: MachineError if the token may only read."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.is_offline_mode():  # before the token is looked for, which need not be there then
        raise OfflineModeIsEnabled
    user = HfApi().whoami()
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise MachineError(
            f"the Hub token of {user['name']} may only read; make one that may write at {endpoint()}/settings/tokens "
            "and run `hf auth login`, or set HF_TOKEN"
        )


def send(files: Sequence[Outgoing], repo_id: str, *, is_private: bool, message: str) -> Sent:
    """Makes the repository if there is none, sends what it lacks, names it in one commit, and reads back what is there.

    Call it inside `hub_errors`, after `log_in`.

    Args:
        repo_id: NAME/MODEL.
        is_private: whether a new repository is private.

    Raises: UsageError if the repository stands there already and is public, where a private one is wanted.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
    from tqdm import tqdm

    api = HfApi()
    card = next((file for file in files if file.name == "README.md"), None)
    if card is not None:
        text = card.content if isinstance(card.content, bytes) else card.content.read_bytes()
        try:
            ModelCard(text.decode()).validate()
        except ValueError as error:
            # A refusal of another kind is a ValueError too, and has an answer of the Hub's with it.
            if getattr(error, "response", None) is not None and error.response.status_code != 400:  # type: ignore[attr-defined]
                raise
            reason = " ".join(str(error).split())
            raise UsageError(
                f"the Hub does not accept the model card's metadata ({reason}); correct push.license, push.language, "
                "push.tags or push.base_model"
            ) from None
    repo_id = api.create_repo(repo_id, private=is_private, exist_ok=True).repo_id
    info = api.model_info(repo_id)
    if is_private and not info.private:
        raise UsageError(
            f"{repo_id} exists and everybody can read it, but push.private is true; set push.private=false to publish "
            "there, or choose another push.repo_id"
        )
    before = _list(api, repo_id, info.sha)
    wanted = {file.name: file for file in files}
    unchanged = tuple(name for name, file in wanted.items() if name in before and before[name].is_same(file))
    replaced = tuple(name for name in wanted if name in before and name not in unchanged)
    others = [name for name in before if name not in wanted and name != ".gitattributes"]  # the Hub's own
    deleted = tuple(name for name in others if _is_loaded(name))
    kept = tuple(name for name in others if name not in deleted)
    for names, what in ((replaced, "replaced"), (deleted, "deleted"), (kept, "left alone")):
        if names:
            logger.info("in %s will be %s: %s", repo_id, what, ", ".join(names))

    commit = str(info.sha)
    if len(unchanged) < len(wanted) or deleted:
        changed = [file for file in files if file.name not in unchanged]
        additions = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in changed
        ]
        total = sum(file.size_bytes for file in changed)
        with tqdm(total=total, desc="push", unit="B", unit_scale=True, leave=False) as bar:
            # Small files in one go; large ones one by one, so that what has arrived is seen and stays.
            small = [addition for addition in additions if addition.upload_info.size < SMALL_BYTES]
            for group in (small, *([addition] for addition in additions if addition not in small)):
                api.preupload_lfs_files(repo_id, group)
                bar.update(sum(addition.upload_info.size for addition in group))
        committed = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name, is_folder=False) for name in deleted)],
            commit_message=message,
            parent_commit=info.sha,  # so that only what was listed above is replaced
        )
        commit = committed.oid
    return Sent(
        repo_id=repo_id,
        url=f"{endpoint()}/{repo_id}",
        commit=commit,
        is_private=bool(info.private),
        unchanged=unchanged,
        replaced=replaced,
        deleted=deleted,
        kept=kept,
        differences=tuple(_differences(wanted, _list(api, repo_id, commit), deleted)),
    )


def _list(api: Any, repo_id: str, revision: str | None) -> dict[str, Remote]:
    found = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision):
        if hasattr(entry, "blob_id"):  # a folder has none
            found[entry.path] = Remote(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
    return found


def _is_loaded(name: str) -> bool:
    if "/" in name:
        return name.startswith(ONNX)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LOADED)


def _differences(wanted: Mapping[str, Outgoing], there: Mapping[str, Remote], deleted: Sequence[str]) -> Iterator[str]:
    for name, file in wanted.items():
        if name not in there:
            yield f"{name} is missing"
        elif there[name].size_bytes != file.size_bytes:
            yield f"{name} has {there[name].size_bytes:,} bytes, not {file.size_bytes:,}"
        elif not there[name].is_same(file):
            yield f"{name} has other bytes"
    yield from (f"{name} is still there" for name in deleted if name in there)


@contextlib.contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _said(error: BaseException, repo_id: str) -> HfscratchError | None:
    """The sentence for what huggingface_hub raised; None for what is no refusal of the Hub's or of the network's."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    again = "what has arrived there is not sent again, so run the same command later"
    for each in _causes(error):
        if isinstance(each, OfflineModeIsEnabled):
            return MachineError("HF_HUB_OFFLINE is set, so nothing can be sent to the Hub; unset it to push")
        if isinstance(each, LocalTokenNotFoundError):
            return MachineError(
                "this machine is not logged in to the Hub; run `hf auth login` with a token that may write, or set "
                "HF_TOKEN"
            )
        if isinstance(each, HfHubHTTPError):
            return _refused(each.response.status_code, each.server_message or "", repo_id, again)
        reason = " ".join(str(each).split()) or type(each).__name__
        if status := re.search(r"\((\d{3}) .*/xet-write-token/", reason):  # hf_xet says it in words alone
            if status[1] == "404":
                return MachineError(
                    f"the Hub at {endpoint()} stores large files without Xet; set HF_HUB_DISABLE_XET=1 and run again"
                )
            return _refused(int(status[1]), "", repo_id, again)
        if isinstance(each, HTTPError | ConnectionError | TimeoutError):
            return MachineError(f"the Hub at {endpoint()} cannot be reached or broke off ({reason}); {again}")
        if type(each).__module__.split(".")[0] == "hf_xet":
            return MachineError(f"the Hub's storage refused or broke off ({reason}); {again}")
    if isinstance(error, RuntimeError | ValueError) and ("LFS batch API" in str(error) or _is_from_xet(error)):
        return MachineError(f"the Hub's storage refused or broke off ({' '.join(str(error).split())}); {again}")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_from_xet(error: BaseException) -> bool:
    """Whether it was raised below huggingface_hub's Xet upload; hf_xet raises Python's own types."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == "_upload_xet_files":
            return True
        frame = frame.tb_next
    return False


def _refused(status: int, message: str, repo_id: str, again: str) -> HfscratchError:
    words = " ".join(message.split())
    reason = f"{status}: {words}" if words else str(status)
    if status == 401:
        return MachineError(
            f"the Hub does not accept this machine's token ({reason}); run `hf auth login` again, or correct HF_TOKEN"
        )
    if status == 403:
        return MachineError(
            f"this machine's token may not write to {repo_id} ({reason}); log in with one that may (`hf auth login`), "
            "or choose another push.repo_id"
        )
    if status == 404:
        return MachineError(f"the Hub has no repository {repo_id} for this token ({reason}); check push.repo_id")
    if status in (409, 412):
        return MachineError(f"{repo_id} was changed by somebody else meanwhile ({reason}); run the same command again")
    if status == 429:
        return MachineError(f"the Hub asks for patience ({reason}); {again}")
    if status >= 500:
        return MachineError(f"the Hub is out of order ({reason}); {again}")
    return MachineError(f"the Hub refused to take {repo_id} ({reason})")
