"""Shares cases out over processes, and finds out which case has ended one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.engine import Finding, finding_of
from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The seeds of the processes that share an op's cases lie this far apart.
STEP = 1_000_003


@dataclass
class Outcome:
    """What came of the cases of one target."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def guarded_memory(folder: Path) -> Path | None:
    """guarded.cpp as a library to preload; None without a compiler, or where a sanitizer guards memory already."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or "san.so" in os.environ.get("LD_PRELOAD", ""):
        return None
    library = folder / "guarded.so"
    options = ["-std=c++20", "-O2", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, str(HERE / "guarded.cpp"), "-o", str(library), "-ldl"], check=True)
    return library


def _environment(library: Path | None, interpreted: bool) -> Mapping[str, str]:
    changed = {"OMP_WAIT_POLICY": "passive"}
    if library is not None:
        changed["LD_PRELOAD"] = str(library)
    if interpreted:
        changed["TRITON_INTERPRET"] = "1"
    return os.environ | changed


def _command(target: str, cases: int, seed: int, folder: Path, name: str, *options: str) -> list[str]:
    files = ["--record", str(folder / f"{name}.case"), "--result", str(folder / f"{name}.json")]
    numbers = ["--cases", str(cases), "--seed", str(seed)]
    return [sys.executable, "-m", "tests.fuzz.worker", target, *numbers, *files, *options]


def run(target: str, cases: int, seed: int, jobs: int, *, interpreted: bool = False) -> Outcome:
    """Checks ``cases`` cases of a target in ``jobs`` processes."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = _environment(guarded_memory(folder), interpreted)
        shares = [cases // jobs + (job < cases % jobs) for job in range(jobs)]
        started = []
        for job, share in enumerate(shares):
            command = _command(target, share, seed + STEP * job, folder, str(job))
            started.append((command, subprocess.Popen(command, cwd=ROOT, env=environment)))
        for job, (command, process) in enumerate(started):
            status = process.wait()
            if status:
                finding = _after_a_crash(command, folder / f"{job}", status, environment)
            else:
                finding = _read(folder / f"{job}.json", outcome.counts)
            if finding is not None:
                outcome.findings.append(finding)
    return outcome


def _read(file: Path, counts: Counter[str]) -> Finding | None:
    result = json.loads(file.read_text())
    counts.update(result["counts"])
    return Finding(**result["finding"]) if result["finding"] else None


def _after_a_crash(command: Sequence[str], files: Path, status: int, environment: Mapping[str, str]) -> Finding:
    """The same cases again, each in a child, which makes the one that ends its process as small as it can."""
    what = f"the process ended by {signal.Signals(-status).name}" if status < 0 else f"the process ended with {status}"
    case = files.with_suffix(".case")
    last = case.read_text() if case.exists() else "no case had begun"
    print(f"{what} in {last}; looking for a smaller one", file=sys.stderr, flush=True)
    again = subprocess.run([*command, "--isolate"], cwd=ROOT, env=environment)
    if again.returncode == 0:
        finding = _read(files.with_suffix(".json"), Counter())
        if finding is not None:
            return finding
    return finding_of(last, TARGETS[command[3]], what)
