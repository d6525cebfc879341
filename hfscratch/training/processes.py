"""What the processes of a launcher tell each other, and what becomes of them when it has gone.

It does not import torch before there is something to tell: whose child a process is must be seen as soon as it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ORPHAN_POLL_S = 0.2
ORPHANED = 137
"""The exit code of a process whose launcher was killed: as if it had been, too."""
ADOPTERS = {"init", "systemd", "tini", "dumb-init", "docker-init", "catatonit", "conmon", "slurmstepd"}
"""Programs that become the parent of processes whose own has gone, beside a container's first process."""
LOST = ("DistBackendError", "Connection closed by peer", "Connection reset by peer")
"""How torch says that another process has ended."""
ACCELERATE = re.compile(r"(.*[\\/])?accelerate(-launch|\.commands\.\w+)?(\.exe)?")
"""The word of a command line that is accelerate's launcher: a script, or the module behind `-m`."""


def broadcast(value: Any, world_size: int) -> Any:
    """The first process's value, on all of them."""
    if world_size == 1:
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_everyone(world_size: int) -> None:
    """Returns when every process has come here."""
    if world_size > 1:
        import torch.distributed

        torch.distributed.barrier()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of this run has ended."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return False
    text = f"{type(error).__name__}: {error}"
    return any(words in text for words in LOST)


def die_with_parent() -> None:
    """Ends this process soon after its launcher is gone: an orphan would write into a run that is begun again.

    The launcher may have gone before this is called, and what takes in its orphans be the parent.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ and _takes_in_orphans(parent):
        os._exit(ORPHANED)
    _when_gone(parent, lambda: os._exit(ORPHANED))


def stop_with_launcher() -> None:
    """Asks this process to save and stop when accelerate's launcher of one process has gone, if it was started by it:
    told to end, that tells nobody. Its environment variables prove nothing, as anybody may have exported them."""
    import psutil

    parent = os.getppid()
    with contextlib.suppress(psutil.Error):
        if any(ACCELERATE.fullmatch(word) for word in psutil.Process(parent).cmdline()):
            _when_gone(parent, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _takes_in_orphans(pid: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return pid == 1 or psutil.Process(pid).name() in ADOPTERS
    return False


def _when_gone(parent: int, act: Callable[[], None]) -> None:
    """Calls `act` in a thread, soon after this process has another parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_POLL_S)
        act()

    threading.Thread(target=watch, name="when-parent-gone", daemon=True).start()


def release_builds() -> None:
    """Deletes the locks of torch extensions (DeepSpeed's operators) whose builds were killed: every later start would
    wait for them for ever.

    A process that builds, or only looks whether it has to, has its lock open. Those of other machines cannot be seen
    from here, so each machine builds into a folder of its own, and, as torch would have it, each version.
    """
    import psutil
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    own = (socket.gethostname(), f"py{sys.version_info.major}{sys.version_info.minor}_{torch.version.cuda or 'cpu'}")
    if root.parts[-2:] != own:  # it was not set by a process that started this one
        root = root.joinpath(*own)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    locks = {path.resolve() for path in root.glob("*/lock")}
    if not locks:
        return
    is_held = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_held |= {Path(each.path).resolve() for each in process.open_files()} & locks
    for lock in locks - is_held:
        lock.unlink(missing_ok=True)


def end(exit_code: int) -> NoReturn:
    """Ends a launcher's process without the interpreter's own end.

    There, a thread of gloo that lets go of its last tensor asks for an interpreter that is no more, and the process
    ends with SIGABRT: seen once in ten runs under DeepSpeed, whether or not the group was destroyed before.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
