"""Runs a statement where the Hub is out of reach, though nothing says so beforehand: offline mode is off."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LONGEST_S = 15
"""From the first request to the answer; transformers left alone retries for half a minute."""
SCRIPT = """
import time, transformers
from hfscratch import serving
from hfscratch.evaluation import causal_model
started = time.perf_counter()
try:
    {statement}
finally:
    print(time.perf_counter() - started)
"""


def without_network(hub: str, statement: str) -> str:
    """The last line that `statement` leaves on stderr: its exception. The hub is "closed" or "answers 503"."""
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with _hub(hub) as (endpoint, requests):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(statement=statement)],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, **online, "HF_ENDPOINT": endpoint},
        )
    assert done.returncode == 1
    assert hub == "closed" or requests, "nothing was looked up, so the test shows nothing"
    assert float(done.stdout.split()[-1]) < LONGEST_S
    return done.stderr.strip().splitlines()[-1]


@contextlib.contextmanager
def _hub(kind: str) -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and the paths that were asked of it."""
    requests: list[str] = []
    if kind == "closed":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield f"http://127.0.0.1:{port}", requests
        return

    class Unavailable(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(503)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Unavailable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
