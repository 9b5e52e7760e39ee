"""Everything that a GPU has to show, in one command: ``python -m benchmarks.gpu``, or ``make gpu``.

Needs PyTorch with CUDA and pytest, nvcc and ninja to build the CUDA kernels, and no network. Results, plots, a log of
each slice and ``slices.json`` go to one folder, as they come. Each slice ends within ``--seconds``. One that has passed
is not run again while the files of the checkout are the same, so that the command can be repeated after an interruption
or a repair; rows that a suite has measured stay, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu.slices import BUILD, ROOT, Slice, every_slice
from benchmarks.harness import machine

# Of tests and suites, beside PyTorch.
MODULES = ("triton", "pytest", "numpy", "pybind11")
PASSED, FAILED, TIMED_OUT, MISSING = "passed", "failed", "timed out", "missing"


class Diary:
    """What became of each slice, in a file that is written anew after each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "slices.json"
        self.entries: dict[str, dict[str, object]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def has_passed(self, name: str) -> bool:
        """With the checkout and the build as they are now; what builds has passed with what it has made."""
        entry = self.entries.get(name, {})
        return entry.get("outcome") == PASSED and entry.get("sources") == machine.sources()

    def note(self, name: str, outcome: str, seconds: float, what: str, sources: str) -> None:
        self.entries[name] = {
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "what": what,
            "date": machine.today(),
            "sources": sources,
        }
        self.file.write_text(json.dumps(self.entries, indent=1) + "\n")


def run(part: Slice, diary: Diary, seconds: float) -> str:
    """Runs a slice's commands, at most so long together; what they print goes to its log, and its end is returned."""
    before = machine.sources()  # which may change while it runs
    if part.missing:
        diary.note(part.name, MISSING, 0.0, f"needs {part.missing}", before)
        return MISSING
    start, outcome, what = time.monotonic(), PASSED, ""
    with (diary.folder / f"{part.name}.log").open("w") as log:
        for command in part.commands:
            print("$", *command, file=log, flush=True)
            code = _code(command, log, seconds - (time.monotonic() - start))
            if code is None:
                outcome, what = TIMED_OUT, " ".join(command)
                break
            if code:
                outcome, what = FAILED, f"{code}: {' '.join(command)}"
                break
    sources = machine.sources() if part.name == BUILD else before
    diary.note(part.name, outcome, time.monotonic() - start, what, sources)
    return outcome


def _code(command: Sequence[str], log: IO[str], seconds: float) -> int | None:
    """The exit code of a command; None if it took too long and was ended, with all that it had started."""
    # The checkout's package and benchmarks are found without an install, too.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this process is interrupted
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(parts: Sequence[Slice], diary: Diary, seconds: float, again: bool) -> int:
    """Each that has not passed yet; how many do not pass."""
    for part in parts:
        if diary.has_passed(part.name) and not again:
            print(f"{part.name:20} passed before", flush=True)
            continue
        outcome = run(part, diary, seconds)
        print(f"{part.name:20} {outcome:10} {diary.entries[part.name]['seconds']:>7} s", flush=True)
        if part.name == BUILD and outcome != PASSED:  # what it lacks, tests would skip
            print(f"nothing else is run: see {diary.folder / part.name}.log", flush=True)
            break
    return sum(not diary.has_passed(part.name) for part in parts)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--folder", type=Path, help="benchmarks/results/gpu-CARD by default")
    p.add_argument("--slice", nargs="+", metavar="NAME", help="only these")
    p.add_argument("--seconds", type=float, default=570.0, help="that a slice may take (%(default)s)")
    p.add_argument("--again", action="store_true", help="also those that have passed")
    p.add_argument("--list", action="store_true", help="print the slices and their commands, and run nothing")
    options = p.parse_args(arguments)
    if not options.list and not torch.cuda.is_available():
        p.error("PyTorch finds no GPU")
    lacking = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if not options.list and lacking:
        p.error(f"these packages are missing: {', '.join(lacking)}")
    folder = options.folder
    if folder is None:
        card = machine.slug(machine.describe(torch.device("cuda"))) if torch.cuda.is_available() else "CARD"
        folder = ROOT / "benchmarks" / "results" / f"gpu-{card}"
    parts = every_slice(folder)
    unknown = sorted(set(options.slice or ()) - {part.name for part in parts})
    if unknown:
        p.error(f"no slice {', '.join(unknown)}; there are {', '.join(part.name for part in parts)}")
    chosen = [part for part in parts if not options.slice or part.name in options.slice]
    if options.list:
        for part in chosen:
            print(f"{part.name}:", *(f"\n  {' '.join(command)}" for command in part.commands))
        return 0
    return min(run_all(chosen, Diary(folder), options.seconds, options.again), 1)


if __name__ == "__main__":
    sys.exit(main())
