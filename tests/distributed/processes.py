"""Runs checks in several processes that form a process group, each a Python of its own in which warnings are errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANGS = 240.0  # seconds after which processes are ended; a check fails on its own after the process group's timeout

Outcomes = dict[str, list[str]]


def run(modules: list[str], ranks: int, folder: Path, *, timeout: float = 60.0) -> tuple[Outcomes, list[int | None]]:
    """What each check of ``modules`` has raised, a text a rank ("" for nothing), and the ranks' exit codes.

    Args:
        modules: of this package; their functions ``check_*`` run in their order, on every rank.
        ranks: the number of processes.
        folder: for the files that they meet in.
        timeout: the process group's, in seconds.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    own = "ignore:Sparse invariant checks are implicitly disabled:UserWarning"  # as in pyproject.toml
    worker = ["-m", "tests.distributed.worker", str(ranks), str(timeout), str(folder)]
    command = [sys.executable, "-W", "error", "-W", own, *worker]
    logs = [(folder / f"log{rank}").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen([*command, str(rank), *modules], env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + HANGS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    found: Outcomes = {}
    for rank, log in enumerate(logs):
        log.close()
        written = folder / f"outcome{rank}"
        for name, text in json.loads(written.read_text()).items() if written.exists() else ():
            found.setdefault(name, ["did not run"] * ranks)[rank] = text
    return found, [process.returncode for process in processes]


def logs(folder: Path) -> str:
    """What the processes have printed."""
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("log*")))
