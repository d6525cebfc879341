"""A stand-in for Slurm: `sbatch`, `srun`, `scontrol`, `scancel` and `squeue` as real executables, for scripts that
are tested where there is no cluster.

Its machines are addresses of the loopback, so that what runs on them can connect to each other by the names that Slurm
would give. It does what Slurm's manual pages (sbatch, srun, scontrol, scancel, squeue; signals as slurmctld and slurmd
send them) say of:

- `#SBATCH` lines up to the first command, each overridden by the command line; options that are not known here are
  an error, so that none is forgotten.
- The batch script: it runs on the first machine, in the folder that it was submitted from, with `SLURM_*` variables;
  its output is written anew or, with `--open-mode=append`, added to. When it ends, what is left of its steps is killed.
- `srun`: one task a machine. A signal to it is passed on to all its tasks; a signal to a step reaches every process of
  it, as with cgroups. When a task's first process ends, what it leaves behind is killed. Its exit code is the highest
  of its tasks', 128 + signal for one that was killed. `--wait` and `--kill-on-bad-exit`.
- `--signal=[B:]SIG@S`: S seconds before the limit, once; with `B:` to the batch shell alone (not even to its children),
  else to the steps and not to the batch shell.
- The time limit: SIGCONT and SIGTERM to the steps, then to the batch script's processes too, after KillWait SIGKILL.
- Preemption with a grace time: SIGCONT and SIGTERM to the steps alone; after the grace time as at the limit, and the
  job is put back (PreemptMode=REQUEUE), unless it has ended or put itself back. The signal of `--signal`, which Slurm
  would send too when it next looks at its clock, is left out.
- A machine that fails: its processes are gone at once, the job is ended as at the limit and put back.
- `scontrol requeue`: the same job once more, with SLURM_RESTART_COUNT one higher; refused after `--no-requeue`.
- `scancel`: as at the limit; with `--signal`, that signal to the steps, with `--batch` to the batch shell alone, with
  `--full` to all.

It does not queue (a job starts at once), and counts time limits in seconds, where Slurm rounds to minutes. Time can be
made to pass: `Cluster.pass_time`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue")
FOLDER = "STAND_IN_FOR_SLURM"
"""The environment variable that tells the commands which cluster is theirs, and by which processes are found."""
POLL_S = 0.02
ROOT = Path(__file__).parent.parent
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------------------------
# The cluster


class Cluster:
    """Machines, and what slurmctld and slurmd do with them; to be used as a context.

    Args:
        folder: for the commands and the jobs' files.
        nodes: names of the machines, addresses of the loopback.
        kill_wait_s: from SIGTERM to SIGKILL (slurm.conf's KillWait).

    Attributes:
        environment: variables under which the commands are found.
    """

    def __init__(self, folder: Path, *, nodes: tuple[str, ...] = ("127.0.0.1", "127.0.0.2"), kill_wait_s: float = 30):
        self.folder, self.nodes, self.kill_wait_s = folder, nodes, kill_wait_s
        self.jobs: dict[int, _Job] = {}
        self._passed_s = 0.0
        self._ends = threading.Event()
        self._lock = threading.RLock()
        (folder / "spool").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "nodes").write_text("\n".join(nodes))
        for name in COMMANDS:
            script = folder / "bin" / name
            script.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                f"from tests import scheduler\nsys.exit(scheduler.main({name!r}, sys.argv[1:]))\n"
            )
            script.chmod(0o755)
        python = Path(sys.executable).parent  # as with an environment that is active
        path = os.pathsep.join([str(folder / "bin"), str(python), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, FOLDER: str(folder)}
        self.environment = {name: value for name, value in self.environment.items() if not name.startswith("SLURM_")}
        self._thread = threading.Thread(target=self._watch, name="slurmctld", daemon=True)

    def __enter__(self) -> Cluster:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._ends.set()
        self._thread.join()
        for process in _processes(self.folder):
            _send(process, signal.SIGKILL)

    def command(self, *words: object, cwd: Path | None = None, **environment: str) -> str:
        """Runs one of the commands, which must succeed; returns what it printed."""
        done = subprocess.run(
            list(map(str, words)),
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: object, cwd: Path | None = None, **environment: str) -> int:
        """`sbatch WORDS`; returns the job's number."""
        return int(self.command("sbatch", *words, cwd=cwd, **environment).split()[-1])

    def job(self, number: int) -> _Job:
        """A job as it is now, as soon as it is known."""
        deadline = time.monotonic() + 10
        while number not in self.jobs:
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
        return self.jobs[number]

    def wait(self, condition: Callable[[], Any], *, timeout_s: float, number: int) -> Any:
        """Waits until a condition holds, and returns what it gave; fails, with what the job said, if it never does, or
        if the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            job = self.job(number)
            assert time.monotonic() < deadline, f"after {timeout_s} s: {job.output[-3000:]}"
            assert not job.is_over or condition(), f"the job ended, {job.state}: {job.output[-3000:]}"
            time.sleep(POLL_S)
        return found

    def wait_for_end(self, number: int, *, timeout_s: float) -> _Job:
        """Waits until a job is over for good."""
        self.wait(lambda: self.job(number).is_over, timeout_s=timeout_s, number=number)
        return self.job(number)

    def pass_time(self, seconds: float) -> None:
        """Lets time limits, and the signals before them, come sooner."""
        self._passed_s += seconds

    def preempt(self, number: int, *, grace_s: float) -> None:
        """Somebody more important needs the machines."""
        with self._lock:
            job = self.jobs[number]
            job.ends_at = min(job.ends_at, self._now() + grace_s)
            job.is_preempted = job.is_warned = True
            self._signal_steps(job, signal.SIGCONT, signal.SIGTERM)

    def fail(self, node: str) -> None:
        """A machine is gone, and with it whatever ran on it."""
        with self._lock:
            for process in _processes(self.folder, SLURMD_NODENAME=node):
                _send(process, signal.SIGKILL)
            for job in self.jobs.values():
                if job.is_running and node in job.nodes:
                    self._end(job, "NODE_FAIL", restarts=job.may_requeue)

    def processes(self, number: int, node: str) -> list[psutil.Process]:
        """What runs of a job's steps on a machine."""
        return list(_processes(self.folder, SLURM_JOB_ID=str(number), SLURMD_NODENAME=node, SLURM_STEP_ID="0"))

    def _now(self) -> float:
        return time.monotonic() + self._passed_s

    def _watch(self) -> None:
        while not self._ends.wait(POLL_S):
            with self._lock:
                self._take_all()
                for job in self.jobs.values():
                    self._step(job)
                    job.write()

    def _take_all(self) -> None:
        for path in sorted((self.folder / "spool").glob("*.request")):
            request = json.loads(path.read_text())
            path.unlink()
            self._take(request)

    def _take(self, request: dict[str, Any]) -> None:
        """What a command asked for."""
        if request["what"] == "submit":
            job = _Job(self.folder, request)
            self.jobs[job.number] = job
            return
        job = self.jobs[request["number"]]
        if request["what"] == "requeue":
            if job.is_running:
                self._end(job, "PENDING", restarts=True)
            elif job.is_completing:
                job.restarts = True
            elif job.is_over:
                job.restart()
        elif not job.is_running:
            return
        elif request["signal"] is None:
            self._end(job, "CANCELLED", restarts=False)
        else:
            if not request["batch"]:
                self._signal_steps(job, request["signal"])
            if request["batch"]:
                _send(psutil.Process(job.process.pid), request["signal"])
            elif request["full"]:
                for process in job.processes(SLURM_STEP_ID="batch"):
                    _send(process, request["signal"])

    def _step(self, job: _Job) -> None:
        """What is to be done with a job now."""
        now = self._now()
        if job.state == "PENDING" and not job.is_completing:
            job.start(self.nodes[: job.num_nodes], now)
            return
        if job.is_running:
            code = job.process.poll()
            if code is not None:
                self._take_all()  # what the script asked for before it ended
                if not job.is_running:
                    return
                for process in job.processes():
                    _send(process, signal.SIGKILL)
                job.exit_code = code
                job.state = "COMPLETED" if code == 0 else "FAILED"
            elif now >= job.ends_at:
                self._signal_steps(job, signal.SIGCONT, signal.SIGTERM)
                self._end(job, "PREEMPTED" if job.is_preempted else "TIMEOUT", restarts=job.is_preempted)
            elif job.warn_signal and not job.is_warned and now >= job.ends_at - job.warn_s:
                job.is_warned = True
                if job.warns_batch:
                    _send(psutil.Process(job.process.pid), job.warn_signal)
                else:
                    self._signal_steps(job, job.warn_signal)
        elif job.is_completing:
            if job.process.poll() is None or any(job.processes()):
                if time.monotonic() < job.killed_at:
                    return
                for process in job.processes():
                    _send(process, signal.SIGKILL)
                return
            job.exit_code = job.process.wait()
            if job.restarts:
                job.restart()
            job.is_completing = False

    def _signal_steps(self, job: _Job, *signals: int) -> None:
        for process in job.processes(SLURM_STEP_ID="0"):
            for each in signals:
                _send(process, each)

    def _end(self, job: _Job, state: str, *, restarts: bool) -> None:
        """Ends a job from outside: all its processes get KillWait from SIGTERM to SIGKILL."""
        job.killed_at = time.monotonic() + self.kill_wait_s
        job.is_completing, job.restarts, job.state = True, restarts, state
        for process in job.processes():
            _send(process, signal.SIGCONT)
            _send(process, signal.SIGTERM)


class _Job:
    """A job, as slurmctld knows it.

    Attributes:
        starts: how often it was started. state: as `squeue` names it; the last one, of a job that is over.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        options = request["options"]
        self.folder, self.number, self.arguments = folder, request["number"], request["arguments"]
        self.script, self.cwd, self.environment = Path(request["script"]), Path(request["cwd"]), request["environment"]
        self.options = options
        self.num_nodes = int(options.get("nodes", "1"))
        self.limit_s = _seconds(options["time"])
        self.may_requeue = "no_requeue" not in options
        name = options.get("job_name", Path(request["name"]).name)
        output = options.get("output", "slurm-%j.out").replace("%j", str(self.number)).replace("%x", name)
        self.log = self.cwd / output
        self.warn_signal, self.warn_s, self.warns_batch = 0, 0.0, False
        if "signal" in options:
            found = re.fullmatch(r"(?P<batch>[RB]*:)?(SIG)?(?P<name>\w+)(@(?P<seconds>\d+))?", options["signal"])
            assert found, f"--signal={options['signal']}"
            self.warn_signal = _number(found["name"])
            self.warn_s = float(found["seconds"] or 60)
            self.warns_batch = "B" in (found["batch"] or "")
        self.state = "PENDING"
        self.starts, self.restart_count, self.exit_code = 0, 0, None
        self.is_completing = self.restarts = self.is_warned = self.is_preempted = False
        self.ends_at = self.killed_at = 0.0
        self.nodes: tuple[str, ...] = ()
        self.process: Any = None

    @property
    def is_running(self) -> bool:
        return self.state == "RUNNING"

    @property
    def is_over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING") and not self.is_completing

    @property
    def output(self) -> str:
        """What its starts printed."""
        return self.log.read_text() if self.log.exists() else ""

    def processes(self, **variables: str) -> Iterator[psutil.Process]:
        return _processes(self.folder, SLURM_JOB_ID=str(self.number), **variables)

    def restart(self) -> None:
        self.restart_count += 1
        self.state = "PENDING"

    def start(self, nodes: tuple[str, ...], now: float) -> None:
        assert len(nodes) == self.num_nodes, f"{self.num_nodes} machines are asked for, and there are {len(nodes)}"
        self.is_warned = self.is_preempted = self.restarts = False
        self.nodes, self.ends_at = nodes, now + self.limit_s
        self.starts += 1
        environment = {
            **self.environment,
            FOLDER: str(self.folder),
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOBID": str(self.number),
            "SLURM_JOB_NAME": self.options.get("job_name", self.script.name),
            "SLURM_JOB_NODELIST": compress(nodes),
            "SLURM_NODELIST": compress(nodes),
            "SLURM_JOB_NUM_NODES": str(len(nodes)),
            "SLURM_NNODES": str(len(nodes)),
            "SLURM_NODEID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_ID": "batch",
            "SLURM_SUBMIT_DIR": str(self.cwd),
            "SLURMD_NODENAME": nodes[0],
            "HOSTNAME": nodes[0],
        }
        for option, name in (("ntasks_per_node", "SLURM_NTASKS_PER_NODE"), ("cpus_per_task", "SLURM_CPUS_PER_TASK")):
            if option in self.options:
                environment[name] = self.options[option]
        if self.restart_count:
            environment["SLURM_RESTART_COUNT"] = str(self.restart_count)
        appends = self.options.get("open_mode") == "append"
        with self.log.open("a" if appends else "w") as log:
            self.process = subprocess.Popen(
                ["bash", str(self.script), *self.arguments],
                cwd=self.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.state = "RUNNING"

    def write(self) -> None:
        """Notes what `squeue` and `scontrol` are to find."""
        state = "COMPLETING" if self.is_completing else self.state
        facts = {"number": self.number, "state": state, "requeue": self.may_requeue, "restarts": self.restart_count}
        path = self.folder / "spool" / f"{self.number}.job"
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(facts))
        aside.replace(path)


def _processes(folder: Path, **variables: str) -> Iterator[psutil.Process]:
    """Processes that were started with these variables: what a cgroup would hold."""
    wanted = {FOLDER: str(folder), **variables}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if wanted.items() <= environment.items() and "SLURM_STEP_ID" in environment:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _send(process: psutil.Process, signum: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signum)


def _number(name: str) -> int:
    """Of a signal, given by number or name."""
    return int(name) if name.isdigit() else int(signal.Signals[f"SIG{name.removeprefix('SIG')}"])


def _seconds(text: str) -> float:
    """A time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def compress(nodes: tuple[str, ...]) -> str:
    """`127.0.0.[1-2]`: names as Slurm writes a list of them."""
    if len(nodes) == 1:
        return nodes[0]
    head = nodes[0].rstrip("0123456789")
    return f"{head}[{nodes[0][len(head) :]}-{nodes[-1][len(head) :]}]"


def expand(nodes: str) -> list[str]:
    """What `scontrol show hostnames` makes of such a list."""
    found = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", nodes)
    if not found:
        return [nodes]
    return [f"{found[1]}{number}" for number in range(int(found[2]), int(found[3]) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def main(name: str, words: list[str]) -> int:
    """Runs one of the commands."""
    return {"sbatch": _sbatch, "srun": _srun, "scontrol": _scontrol, "scancel": _scancel, "squeue": _squeue}[name](
        words
    )


def _ask(**request: Any) -> None:
    folder = Path(os.environ[FOLDER]) / "spool"
    path = folder / f"{time.monotonic_ns()}-{os.getpid()}.request"
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(request))
    aside.replace(path)


def _job_facts(number: int) -> dict[str, Any] | None:
    path = Path(os.environ[FOLDER]) / "spool" / f"{number}.job"
    return json.loads(path.read_text()) if path.exists() else None


def _batch_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sbatch", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for option in ("job-name", "nodes", "ntasks-per-node", "time", "signal", "open-mode", "output", "cpus-per-task"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--no-requeue", action="store_true")
    return parser


def _sbatch(words: list[str]) -> int:
    parser = _batch_options()
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = vars(parser.parse_args(words))
    script, arguments = Path(given.pop("script")), given.pop("arguments")
    lines = script.read_text().splitlines()
    if not lines or not lines[0].startswith("#!"):
        sys.stderr.write("sbatch: error: This does not look like a batch script\n")
        return 1
    written: list[str] = []
    for line in lines:
        if line.startswith("#SBATCH"):
            written += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break
    options = {**vars(_batch_options().parse_args(written)), **given}
    folder = Path(os.environ[FOLDER])
    number = len(list((folder / "spool").glob("*.script"))) + 1
    copy = folder / "spool" / f"{number}.script"  # a job keeps the script that it was submitted with
    copy.write_text(script.read_text())
    _ask(
        what="submit",
        number=number,
        name=script.name,
        script=str(copy),
        arguments=arguments,
        options=options,
        cwd=str(Path.cwd()),
        environment=dict(os.environ),
    )
    sys.stdout.write(f"Submitted batch job {number}\n")
    return 0


def _srun(words: list[str]) -> int:
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    parser.add_argument("--ntasks-per-node", type=int, default=1, choices=[1])
    parser.add_argument("--kill-on-bad-exit", type=int, default=0)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    nodes = expand(os.environ["SLURM_JOB_NODELIST"])
    folder, number = Path(os.environ[FOLDER]), os.environ["SLURM_JOB_ID"]
    tasks: list[subprocess.Popen[bytes]] = []

    def of_step(**variables: str) -> Iterator[psutil.Process]:
        return _processes(folder, SLURM_JOB_ID=number, SLURM_STEP_ID="0", **variables)

    def forward(signum: int, frame: Any) -> None:
        for process in of_step():
            _send(process, signum)

    for each in FORWARDED:
        signal.signal(each, forward)
    for rank, node in enumerate(nodes):
        environment = {
            **os.environ,
            "SLURM_STEP_ID": "0",
            "SLURM_STEPID": "0",
            "SLURM_NTASKS": str(len(nodes)),
            "SLURM_STEP_NODELIST": compress(tuple(nodes)),
            "SLURM_NODEID": str(rank),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": node,
            "HOSTNAME": node,
        }
        tasks.append(subprocess.Popen(given.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))
    ended: set[int] = set()
    first_end = None
    while len(ended) < len(tasks):
        time.sleep(POLL_S)
        for rank, task in enumerate(tasks):
            if rank in ended or task.poll() is None:
                continue
            ended.add(rank)
            first_end = first_end or time.monotonic()
            for process in of_step(SLURM_NODEID=str(rank)):
                _send(process, signal.SIGKILL)
            if task.returncode != 0:
                sys.stderr.write(f"srun: error: {nodes[rank]}: task {rank}: exited with {task.returncode}\n")
                if given.kill_on_bad_exit:
                    forward(signal.SIGKILL, None)
        if first_end and given.wait and time.monotonic() > first_end + given.wait and len(ended) < len(tasks):
            sys.stderr.write(f"srun: error: the first task ended {given.wait:.0f} s ago; killing the others\n")
            forward(signal.SIGKILL, None)
            first_end = time.monotonic()
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def _scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write("\n".join(expand(words[2] if len(words) > 2 else os.environ["SLURM_JOB_NODELIST"])) + "\n")
        return 0
    assert words[0] == "requeue" and len(words) == 2, f"scontrol {' '.join(words)}"
    facts = _job_facts(int(words[1]))
    if facts is None or not facts["requeue"]:
        why = "Invalid job id specified" if facts is None else "Requested operation is presently disabled"
        sys.stderr.write(f"{why} for job {words[1]}\n")
        return 1
    _ask(what="requeue", number=int(words[1]))
    return 0


def _scancel(words: list[str]) -> int:
    parser = argparse.ArgumentParser("scancel", allow_abbrev=False)
    parser.add_argument("--signal", "-s")
    parser.add_argument("--batch", "-b", action="store_true")
    parser.add_argument("--full", "-f", action="store_true")
    parser.add_argument("number", type=int)
    given = parser.parse_args(words)
    signum = None if given.signal is None else _number(given.signal)
    _ask(what="cancel", number=given.number, signal=signum, batch=given.batch, full=given.full)
    return 0


def _squeue(words: list[str]) -> int:
    parser = argparse.ArgumentParser("squeue", allow_abbrev=False, add_help=False)
    parser.add_argument("--noheader", "-h", action="store_true")
    parser.add_argument("--job", "--jobs", "-j", type=int)
    parser.add_argument("--format", "-o", default="%i %T")
    given = parser.parse_args(words)
    if not given.noheader:
        sys.stdout.write(given.format.replace("%i", "JOBID").replace("%T", "STATE") + "\n")
    for path in sorted((Path(os.environ[FOLDER]) / "spool").glob("*.job")):
        facts = json.loads(path.read_text())
        is_asked = given.job in (None, facts["number"])
        if is_asked and facts["state"] in ("PENDING", "RUNNING", "COMPLETING"):
            sys.stdout.write(given.format.replace("%i", str(facts["number"])).replace("%T", facts["state"]) + "\n")
    return 0
