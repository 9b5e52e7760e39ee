"""Counts the instructions of :mod:`benchmarks.guard.calls` in a process under valgrind's callgrind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mtlkernels import _extension

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALL = (
    "bench-guard counts instructions with valgrind, which is not here. Debian and Ubuntu: apt-get install valgrind;"
    " Fedora: dnf install valgrind; conda: conda install -c conda-forge valgrind."
)
# One thread, hashes that do not change from run to run, and no instructions that valgrind does not know.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
}


class Unavailable(RuntimeError):
    """Nothing can be counted here; the message says why."""


def count(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Instructions of each call, by name, and what they depend on; callgrind's files are left in ``folder``.

    Raises:
        Unavailable: valgrind or the C++ kernels are not there, or the process under it fails.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Unavailable(INSTALL)
    if not _extension.loaded():
        raise Unavailable("bench-guard counts the C++ kernels' instructions, and this install has none")
    out = folder / "callgrind.out"
    for earlier in folder.glob(f"{out.name}*"):
        earlier.unlink()
    command = [valgrind, "--quiet", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "benchmarks.guard.calls"],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise Unavailable(f"the calls under valgrind failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    version = subprocess.run([valgrind, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return by_call(told["calls"], told["counted"], totals(out)), told["settings"] | {"valgrind": version}


def totals(out: Path) -> list[int]:
    """Instructions in each of the files that the process asked callgrind to write, in that order."""
    found = {}
    for path in out.parent.glob(f"{out.name}.*"):
        text = path.read_text()
        part, total = re.search(r"^part: (\d+)$", text, re.MULTILINE), re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if part is None or total is None:
            raise Unavailable(f"{path} is not what callgrind writes")
        found[int(part[1])] = int(total[1])
    return [found[part] for part in sorted(found)]


def by_call(names: Sequence[str], counted: int, found: Sequence[int]) -> dict[str, float]:
    """Instructions of one call, by name, where each file counts so many calls."""
    if len(found) != len(names):
        raise Unavailable(f"callgrind wrote {len(found)} files for {len(names)} calls")
    return {name: total / counted for name, total in zip(names, found, strict=True)}
