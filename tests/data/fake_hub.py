"""A Hub on the loopback, with one dataset or with a status that it answers everything with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(files: Mapping[str, bytes] | None = None, *, status: int = 404, revision: str = REVISION) -> Iterator[str]:
    """The endpoint of a Hub whose dataset someone/small has these files; without files it only answers `status`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            _, _, name = path.partition("/datasets/someone/small/resolve/")
            name = name.partition("/")[2]
            if files is None:
                self.answer(status)
            elif name in files:
                etag = hashlib.sha1(files[name]).hexdigest()
                self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=revision)
            elif "nowhere" in path:
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif "/resolve/" in path:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)
            elif path.startswith("/api/datasets/someone/small/tree/"):
                self.answer_json([self.entry(each) for each in files])
            elif path.startswith("/api/datasets/someone/small"):
                siblings = [{"rfilename": each} for each in files]
                self.answer_json({"id": "someone/small", "sha": revision, "siblings": siblings, "tags": []})
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            self.answer_json([self.entry(each) for each in wanted if each in (files or {})])

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        @staticmethod
        def entry(name: str) -> dict[str, object]:
            data = (files or {})[name]
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
