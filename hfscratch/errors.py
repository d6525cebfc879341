"""The errors that a user can cause, each with its exit code; `cli.main` is the only place that catches them.

A message is one sentence: what is wrong, the value that was got, what to do. Anything that is not an
`HfscratchError` (or an operating-system or interrupt condition that `cli` knows) is a bug of ours and shows a
traceback.
"""

import signal

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What asks a run to save and stop: the system's way, and what schedulers' scripts ask for, which Windows has not."""


class HfscratchError(Exception):
    """Base of every error that is shown to the user as one sentence.

    Attributes:
        exit_code: what the process exits with (see the README's table of exit codes).
    """

    exit_code = 1


class UsageError(HfscratchError):
    """A bad command line, recipe, path or model folder."""

    exit_code = 2


class DataError(HfscratchError):
    """Input text that cannot be used."""

    exit_code = 3


class ProofFailed(HfscratchError):
    """Something we claim of an artifact did not hold when it was checked."""

    exit_code = 4


class MachineError(HfscratchError):
    """The machine cannot do it: a dependency, the network, space or permission is missing."""

    exit_code = 5


class Terminated(HfscratchError):
    """One of `STOP_SIGNALS` arrived, and the same command goes on from what is saved.

    While a model trains, `training.trainer` raises it, after the step has ended and a checkpoint been saved; anywhere
    else `cli` does, in the midst of what is running. The exit code is that of SIGTERM (128 + 15), for SIGUSR1 too.
    """

    exit_code = 143


def missing_extra(package: str, extra: str) -> MachineError:
    """The error for an optional dependency that is not installed; its message is the install command."""
    return MachineError(f"{package} is not installed; run: pip install 'hfscratch[{extra}]'")
