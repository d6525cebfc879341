"""Fetches the tests that the installed transformers has in its source archive, and writes the folder they lie in.

Run: python tests/common/fetch.py FOLDER. The folder keeps one subfolder a version, so a second run fetches nothing.
pip fetches the archive, from the index that it is set up for, and verifies it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

TIMEOUT_S = 180


def fetch(folder: Path) -> Path:
    """The folder of the tests of the installed version, fetched into `folder` unless it is there.

    Raises: subprocess.CalledProcessError, after pip has said why, if it cannot.
    """
    wanted = version("transformers")
    target = folder / wanted
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={wanted}"]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=sys.stderr)
        prefix = f"transformers-{wanted}/tests/"
        with tarfile.open(Path(scratch, f"transformers-{wanted}.tar.gz")) as archive:
            archive.extractall(scratch, [file for file in archive if file.name.startswith(prefix)], filter="data")
        Path(scratch, prefix, "__init__.py").touch()  # not in the archive, and test_configuration_common executes it
        Path(scratch, prefix).replace(target)
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{fetch(Path(sys.argv[1])).resolve()}\n")
