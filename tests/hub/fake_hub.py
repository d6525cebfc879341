"""A Hub on the loopback that one can push to and load from: its HTTP protocol, with faults to switch on.

It keeps repositories as lists of commits, large files by their sha256 (uploaded before the commit that names them, in
one piece or in parts), and a journal of every request. What a commit names must have arrived whole. Downloads of large
files redirect to a second server, as those of the real Hub do to a CDN. Xet, pull requests and branches are not spoken.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_write"
READ_TOKEN = "hf_read"
LFS_SUFFIXES = (".safetensors", ".onnx")
LICENSES = ("apache-2.0", "mit")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Blob:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else git_oid(self.content)

    def entry(self, path: str) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(self.content)}
        if self.is_lfs:
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\n" % self.oid.encode()
            lfs = {"oid": self.oid, "size": len(self.content), "pointerSize": len(pointer)}
            return entry | {"oid": git_oid(pointer), "lfs": lfs}
        return entry | {"oid": self.oid}


@dataclass
class Repo:
    """A model repository: its commits, oldest first, each as `(oid, {path: blob})`."""

    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[-1][1]

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: dict[str, Blob]) -> str:
        listed = [(path, blob.oid) for path, blob in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([len(self.commits), listed]).encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose path holds `part`.

    Attributes:
        does: a status to answer; or "break" (read half of the body, then hang up) or "silence" (never answer).
        times: how often; None for always.
        code: the Hub's X-Error-Code.
    """

    method: str
    part: str
    does: int | str
    times: int | None = None
    code: str | None = None


@dataclass
class FakeHub:
    """What the server serves, and what it was asked."""

    url: str = ""
    cdn_url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    journal: list[tuple[str, str]] = field(default_factory=list)
    chunk_size: int | None = None
    owner: str = "someone"

    def environment(self, home: Path) -> dict[str, str]:
        """What another process needs to push to it and to load from it, with a cache of its own at `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def asked(self, method: str, part: str) -> int:
        """How often a request of `method` with `part` in its path came."""
        return sum(each == method and part in path for each, path in self.journal)

    def add_repo(self, repo_id: str, *, private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        """A repository as the Hub makes it, with the file that every one of them begins with."""
        repo = self.repos[repo_id] = Repo(private)
        content = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", **(files or {})}
        repo.commit({path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in content.items()})
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.journal.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        fault = next((each for each in self.hub.faults if each.method == self.command and each.part in path), None)
        if fault is not None and fault.times != 0:
            if fault.times is not None:
                fault.times -= 1
            if fault.does == "break":
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.close()
                return
            body = self.rfile.read(length)
            if fault.does == "silence":
                time.sleep(3)
                self.close_connection = True
                return
            self.refuse(int(fault.does), "as the test has it", fault.code)
            return
        body = self.body(length)
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self.whoami()
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body))
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif parts[0] == "lfs":
            self.store(parts[1:], body)
        elif parts[0] == "cdn":
            self.answer_range(self.hub.large[parts[1]], {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self.api(parts[2:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse(404, "no such page")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    # Answers

    def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, message: str, error_code: str | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self.answer(code, body, headers | ({"X-Error-Code": error_code} if error_code else {}))

    def answer_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, content, headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        where = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.answer(206, content[start : end + 1], headers | where)

    # Who asks

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def is_owner(self, repo_id: str) -> bool:
        return self.token in (TOKEN, READ_TOKEN) and repo_id.startswith(f"{self.hub.owner}/")

    def may_write(self, repo_id: str) -> bool:
        if self.token == TOKEN and repo_id.startswith(f"{self.hub.owner}/"):
            return True
        self.refuse(403, f"You don't have the rights to write to {repo_id}")
        return False

    # The endpoints

    def whoami(self) -> None:
        roles = {TOKEN: "write", READ_TOKEN: "read"}
        if self.token not in roles:
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        access = {"displayName": "a token", "role": roles[self.token]}
        user = {"type": "user", "name": self.hub.owner, "orgs": [], "auth": {"accessToken": access}}
        self.answer_json(user)

    def validate(self, asked: dict) -> None:
        metadata = yaml.safe_load(asked["content"].split("---\n")[1])
        if metadata.get("license", LICENSES[0]) not in LICENSES:
            self.answer(400, b'"license" must be one of [' + ", ".join(LICENSES).encode() + b"]")
        else:
            self.answer_json({"errors": [], "warnings": []})

    def create(self, asked: dict) -> None:
        repo_id = f"{asked.get('organization') or self.hub.owner}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos and self.is_owner(repo_id):
            self.answer_json({"error": "You already created this model repo", "url": url}, 409)
        elif self.may_write(repo_id):
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.hub.add_repo(repo_id, private=private)
            self.answer_json({"url": url, "name": repo_id})

    def readable(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_owner(repo_id)):
            self.refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    def api(self, parts: list[str], body: bytes) -> None:
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        repo = self.readable(repo_id)
        if repo is None:
            return
        action, revision = [*rest, "", ""][:2]
        commit = repo.at(revision or "main")
        if commit is None:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
            return
        oid, files = commit
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            about = {"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "tags": []}
            self.answer_json(about | {"siblings": siblings})
        elif action == "tree":
            self.tree(files, "/".join(rest[2:]))
        elif action == "paths-info":
            wanted = parse_qs(body.decode())["paths"] if b"paths=" in body else json.loads(body)["paths"]
            self.answer_json([files[path].entry(path) for path in wanted if path in files])
        elif action not in ("preupload", "commit"):
            self.refuse(404, "no such page")
        elif not self.may_write(repo_id):
            return
        elif action == "preupload":
            self.answer_json({"files": [self.upload_mode(each, files) for each in json.loads(body)["files"]]})
        else:
            self.commit(repo_id, repo, [json.loads(line) for line in body.splitlines()])

    def tree(self, files: dict[str, Blob], below: str) -> None:
        found = [blob.entry(path) for path, blob in files.items() if not below or path.startswith(f"{below}/")]
        folders = {path.rpartition("/")[0] for path in files if "/" in path}
        if "recursive=true" not in self.path.lower():
            depth = below.count("/") + 1 if below else 0
            found = [each for each in found if str(each["path"]).count("/") == depth]
        found += [{"type": "directory", "path": each, "oid": git_oid(each.encode())} for each in sorted(folders)]
        self.answer_json(found)

    @staticmethod
    def upload_mode(asked: dict, files: dict[str, Blob]) -> dict[str, object]:
        path = asked["path"]
        is_lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000
        mode: dict[str, object] = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
        return mode | ({"oid": files[path].oid} if path in files else {})

    def batch(self, asked: dict) -> None:
        objects = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            if oid in self.hub.large:
                objects.append(each)
                continue
            upload: dict[str, object] = {"href": f"{self.hub.url}/lfs/{oid}"}
            chunk = self.hub.chunk_size
            if chunk is not None and size > chunk:
                numbers = range(1, -(-size // chunk) + 1)
                header = {str(number): f"{self.hub.url}/lfs/{oid}/{number}" for number in numbers}
                upload = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(chunk), **header}}
            verify = {"href": f"{self.hub.url}/lfs/{oid}/verify"}
            objects.append({**each, "actions": {"upload": upload, "verify": verify}})
        self.answer_json({"transfer": "basic", "objects": objects})

    def store(self, parts: list[str], body: bytes) -> None:
        oid, what = parts[0], parts[1] if len(parts) > 1 else ""
        if what == "verify":
            asked = json.loads(body)
            is_here = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
            self.answer_json({}, 200 if is_here else 404)
            return
        if what.isdigit():
            self.hub.parts[oid, int(what)] = body
            self.answer(200, headers={"ETag": hashlib.md5(body).hexdigest()})
            return
        if what == "complete":
            numbers = sorted(number for each, number in self.hub.parts if each == oid)
            etags = {each["partNumber"]: each["etag"] for each in json.loads(body)["parts"]}
            whole = [self.hub.parts[oid, number] for number in numbers]
            assert etags == {n: hashlib.md5(each).hexdigest() for n, each in zip(numbers, whole, strict=True)}
            body = b"".join(whole)
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "the content does not have the digest that was announced")
            return
        self.hub.large[oid] = body
        self.answer_json({})

    def commit(self, repo_id: str, repo: Repo, lines: list[dict]) -> None:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repo.head):
                self.refuse(412, "A commit has happened since. Please refresh and try again.")
                return
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    self.refuse(400, f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files)
        self.answer_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.readable(repo_id)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
            return
        oid, files = commit
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif files[path].is_lfs:
            blob = files[path]
            self.hub.large[blob.oid] = blob.content
            linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.oid}"'}
            self.answer(302, b"", headers | linked | {"Location": f"{self.hub.cdn_url}/cdn/{blob.oid}"})
        else:
            blob = files[path]
            self.answer_range(blob.content, headers | {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"})


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running Hub without repositories. A process reaches it with `FakeHub.environment`."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def own_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """An empty Hub that `huggingface_hub` in this process takes for its own, logged in, without Xet.

    Args:
        folder: where no token is kept.
    """
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # huggingface_hub would wait up to 23 s between its retries.
        monkeypatch.setattr("huggingface_hub.utils._http.time", FastTime)
        yield hub


class FastTime:
    """Python's `time`, but for sleeping."""

    sleep = staticmethod(lambda seconds: None)
    monotonic, time, perf_counter = time.monotonic, time.time, time.perf_counter
