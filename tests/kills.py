"""Starts a command, kills all its processes at a random moment, and starts it again, as often as is asked for.

A kill is `SIGKILL`: nothing is saved, nothing cleaned up. Of several processes, all are killed at once, or the launcher
alone, as chance has it; then its processes must end by themselves. Saves are short, so that few kills would hit one;
`SLOW_SAVES` makes them long, and with it the window in which a checkpoint is half written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from hfscratch.training.watching import MEASURED

SLOW_SAVES = """
import time
from hfscratch.training import checkpoints
from hfscratch.training import batch, precision
batch.MAX_CPU_TOKENS = {micro_tokens}
if {fp32}:
    precision.choose_precision = lambda: precision.Precision("fp32", "the test asks for it")
if {fsdp}:
    from tests import fsdp_on_cpu
for name in ("commit", "rotate", "discard"):
    def slow(*args, original=getattr(checkpoints, name), **kwargs):
        time.sleep({seconds})
        return original(*args, **kwargs)
    setattr(checkpoints, name, slow)
write = checkpoints.write_json
def slow_write(path, value):
    time.sleep({seconds})
    write(path, value)
checkpoints.write_json = slow_write
"""
START = "import hfscratch.__main__\n"
LONGEST_S = 300.0
ORPHANS_END_S = 30.0
"""The most seconds that a launcher's processes may live on without it."""
ROOT = Path(__file__).parent.parent
FROM_US = 'Traceback (most recent call last):\n  File "' + str(ROOT / "hfscratch")
"""A bug of ours; of a launcher that reports its processes' exit code, there may be a traceback."""


def command(
    *words: object,
    save_seconds: float = 0.0,
    micro_tokens: int = 128,
    fp32: bool = False,
    engine: str | None = None,
    launcher: Sequence[str] = (),
    also: str = "",
) -> list[str]:
    """The command line of `hfscratch WORDS`, with gradients accumulated over pieces of at most `micro_tokens`, and
    saves made longer.

    Args:
        fp32: whether to compute in it whatever the machine is good at.
        engine: a file of accelerate_configs/ to launch it with, or None for one process.
        launcher: in its place, a launcher's module and arguments.
        also: lines of Python that are run before hfscratch starts.
    """
    values = {"seconds": save_seconds, "micro_tokens": micro_tokens, "fp32": fp32, "fsdp": engine == "fsdp2"}
    text = SLOW_SAVES.format(**values) + also + START
    digest = hashlib.sha256(f"{ROOT}{text}".encode()).hexdigest()  # another checkout has a script of its own
    script = Path(tempfile.gettempdir()) / f"hfscratch-{os.getuid()}-{digest}.py"
    aside = script.with_suffix(f".{os.getpid()}")
    aside.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{text}")
    aside.replace(script)
    if engine is not None:
        config = ROOT / "accelerate_configs" / f"{engine}.yaml"
        launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    return [sys.executable, *launcher, str(script), *map(str, words)]


def environment() -> dict[str, str]:
    """That of a command of several processes: what DeepSpeed needs on a machine without a GPU."""
    return os.environ | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})


def run_to_the_end(words: Sequence[str], **kwargs: Any) -> str:
    """Runs a command that must succeed; returns what it said."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST_S, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@contextlib.contextmanager
def start(words: Sequence[str], log: Path, **kwargs: Any) -> Iterator[subprocess.Popen]:
    """A command in a session of its own, with what it says in a file; it is killed if it has not ended by then."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True, **kwargs)
        try:
            yield process
        finally:
            if process.poll() is None:
                kill(process)


def kill(process: subprocess.Popen, *, with_descendants: bool = True) -> None:
    """Kills a command that was started in a session of its own, and returns when all its processes are gone."""
    descendants = psutil.Process(process.pid).children(recursive=True)  # torch gives each a session of its own
    os.killpg(process.pid, signal.SIGKILL)
    for each in descendants if with_descendants else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    _, alive = psutil.wait_procs(descendants, timeout=ORPHANS_END_S)
    assert not alive, alive


def run_with_kills(
    words: Sequence[str],
    *,
    kills: int,
    seed: int,
    work: Path,
    between: tuple[float, float],
    since: str = "step",
    after_kill: Callable[[], None] | None = None,
    at_last: Sequence[str] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Runs a command, kills it `kills` times while it trains, and at last lets it end.

    Args:
        work: the stage's folder of checkpoints: a kill waits until there is one.
        between: the least and the most seconds from the moment that training goes on to a kill.
        since: what it says then, some time after its plan.
        after_kill: called when all processes are gone.
        at_last: the command that is let to its end; the same if not given.

    Returns: what each start said. One that ended before its kill came is not counted as killed.
    """
    chance = random.Random(seed)
    said = []
    for _ in range(kills):
        log = work.parent.parent / f"start-{len(said)}.log"
        with start(words, log, **kwargs) as process:
            deadline = time.monotonic() + LONGEST_S
            while since not in log.read_text().rpartition("will train")[2] and process.poll() is None:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.02)
            deadline = time.monotonic() + chance.uniform(*between)
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.005)
            with_descendants = chance.random() < 0.5
            if process.poll() is None:
                kill(process, with_descendants=with_descendants)
        said.append(log.read_text())
        if process.returncode == 0:
            return said
        assert process.returncode == -signal.SIGKILL, said[-1][-3000:]
        if after_kill is not None:
            after_kill()
    said.append(run_to_the_end(at_last or words, **kwargs))
    return said


def outcome(pretrain: Path) -> dict[str, Any]:
    """What must be equal, bit by bit: the published weights, the state of the last checkpoint, and the curve."""
    manifest = json.loads((pretrain / "manifest.json").read_text())
    history = json.loads((pretrain / "metrics.json").read_text())["history"]
    return {
        "weights": manifest["files"]["model.safetensors"]["sha256"],
        "state": manifest["metrics"]["state"],
        "published_step": manifest["metrics"]["published_step"],
        "history": [{name: value for name, value in row.items() if name not in MEASURED} for row in history],
    }
