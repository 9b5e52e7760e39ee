"""What is run under each sanitizer, and what a finding is."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import instrumented
from tests.csrc import sanitizers
from tests.sanitize import planted

# Tests that run the C++ kernels, but for those that compile, or count page faults, and those that start processes, in
# which nothing else is run.
OPS = ("tests/ops", "tests/nn", "tests/optim", "tests/test_prepare.py", "tests/test_selfcheck.py")
WITHOUT = ("tests/ops/test_compile.py", "tests/ops/test_forks.py")
NAMES_WITHOUT = "not Compiled and not compile and not fullgraph and not inductor and not page_faults"
SHORT = ("tests/ops/level/test_gate_layers.py", "tests/ops/gated_mixture", "tests/ops/snr_aver", "tests/ops/pcgrad")
# Of several threads.
SHARED = ("tests/ops/level", "tests/ops/gated_mixture", "tests/ops/snr_trans", "tests/ops/snr_aver", "tests/ops/pcgrad")
NAMES_SHARED = "thread or block or groups or same_bits"


@dataclass(frozen=True)
class Outcome:
    """``text`` is a line of what was done; ``findings`` what was found wrong, if anything was."""

    text: str
    findings: str = ""


@dataclass(frozen=True)
class Phase:
    """``run`` takes whether it has to be short."""

    kind: str
    name: str
    run: Callable[[str, bool], Outcome]


def checked(kind: str, *arguments: str) -> tuple[str, str]:
    """Runs Python with the build; what it printed, and that with the sanitizer's reports where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        logged = {name: f"{value}:log_path={folder}/report" for name, value in instrumented.OPTIONS[kind].items()}
        status, printed = instrumented.output(kind, arguments, {**logged, "OMP_WAIT_POLICY": "passive"})
        reports = [path.read_text(errors="replace") for path in sorted(Path(folder).iterdir())]
    if status == 0 and not reports:
        return printed, ""
    return printed, "\n".join([*reports, printed[-5000:], f"exit status {status}"])


def build(kind: str, short: bool) -> Outcome:
    instrumented.build(kind)
    return Outcome("built")


def planted_faults(kind: str, short: bool) -> Outcome:
    """In a process that goes on after a report."""
    names = list(sanitizers.FAULTS[kind])
    going_on = {name: f"{value}:halt_on_error=0" for name, value in instrumented.OPTIONS[kind].items()}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "planted.so"
        planted.compile_for(kind, library)
        _, printed = instrumented.output(kind, ["-m", "tests.sanitize.planted", str(library), *names], going_on)
    missed = sanitizers.not_found(kind, printed)
    text = f"{len(names) - len(missed)} of {len(names)} found"
    return Outcome(text, f"not found: {', '.join(missed)}\n{printed}" if missed else "")


def tests(kind: str, *arguments: str) -> Outcome:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "--maxprocesses=4", "--dist=worksteal"]
    printed, findings = checked(kind, *command, "--require-backend=cpp", *arguments)
    counts = re.findall(r"^(?=.*\d+ passed).*$", printed, re.MULTILINE)
    return Outcome(re.sub(r" in .*|=+ ?", "", counts[-1]) if counts else "no test has passed", findings)


def ops(kind: str, short: bool) -> Outcome:
    ignored = [f"--ignore={path}" for path in WITHOUT]
    return tests(kind, *(SHORT if short else OPS), *ignored, "-m", "not slow", "-k", NAMES_WITHOUT)


def shared(kind: str, short: bool) -> Outcome:
    names = f"({NAMES_SHARED}) and {NAMES_WITHOUT}"
    return tests(kind, *(SHARED[1:] if short else SHARED), "-m", "not slow", "-k", names)


def fuzz(kind: str, short: bool) -> Outcome:
    cases = "60" if short else "600"
    command = ["-m", "tests.fuzz", "--without-triton", "--cases", cases, "--seed", "0", "--jobs", "2"]
    _, findings = checked(kind, *command)
    return Outcome(f"{cases} cases a target", findings)


def threads(kind: str, short: bool) -> Outcome:
    printed, findings = checked(kind, "-m", "tests.sanitize.threads", "1" if short else "4")
    return Outcome(f"{printed.splitlines()[-1]} of 6 threads" if printed else "nothing was run", findings)


PHASES = (
    Phase("address", "build", build),
    Phase("address", "planted", planted_faults),
    Phase("address", "threads", threads),
    Phase("address", "ops", ops),
    Phase("address", "fuzz", fuzz),
    Phase("thread", "build", build),
    Phase("thread", "planted", planted_faults),
    Phase("thread", "threads", threads),
    Phase("thread", "ops", shared),
)
