"""Builds and tests the last commit with pairs of Python and PyTorch, each in a clone and an environment of its own.

``make matrix`` runs it; it needs nothing but Python's own library. An interpreter that this machine lacks is reported
as not run, never as passed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from release.interpreters import environment, interpreter

ROOT = Path(__file__).resolve().parents[1]
# The oldest, one of the middle, and the newest of both.
PAIRS = ("3.10:2.10", "3.11:2.13", "3.12:2.12", "3.13:2.15", "3.14:2.15")
COLUMNS = ("Python", "torch", "Triton", "compiler", "kernels", "passed", "failed", "skipped", "minutes")

# What an environment turned out to be made of.
FACTS = """
import importlib.metadata, importlib.util, json, platform, torch
from mtlkernels import _extension
kernels = [name for name, there in (("C++", _extension.loaded()), ("CUDA", _extension.cuda_loaded())) if there]
triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
print(json.dumps({
    "Python": platform.python_version(), "torch": torch.__version__, "Triton": triton,
    "compiler": _extension.build_facts().get("compiler", "none"), "kernels": ", ".join(kernels) or "none",
}))
"""


class Failed(Exception):
    """A step ended with an error; its output is in the log."""


@dataclass
class Result:
    """A row of the table: what is known of each column, and why there is no number of tests, if there is none."""

    columns: dict[str, str]
    reason: str = ""
    log: Path | None = None
    not_run: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.reason and self.counts.get("failed", 1) == 0 and self.counts.get("passed", 0) > 0


def pair(text: str) -> tuple[str, str]:
    """Python's version and torch's of ``3.10:2.10``."""
    if not (found := re.fullmatch(r"(\d+\.\d+):(\d+\.\d+(?:\.\d+)?)", text)):
        raise argparse.ArgumentTypeError(f"a pair looks like 3.11:2.13 or 3.11:2.13.0, not like {text!r}")
    return found[1], found[2]


def run(log: Path, *command: str | Path, cwd: Path, **variables: str) -> int:
    """The command's exit status; what it writes is added to the log."""
    with log.open("a") as out:
        print("$", *command, file=out, flush=True)
        return subprocess.run(
            command, cwd=cwd, env=environment(**variables), stdout=out, stderr=subprocess.STDOUT
        ).returncode


def counts(report: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped, from pytest's report; errors count as failures."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in xml.etree.ElementTree.parse(report).getroot().iter("testsuite"):
        for name in total:
            total[name] += int(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def build_and_test(python: Path, torch: str, folder: Path, select: list[str], result: Result) -> None:
    """Fills in the result; raises Failed with the step that did not succeed."""
    log, clone, report = folder / "log.txt", folder / "mtlkernels", folder / "tests.xml"
    result.log = log
    # Against pip's own constraints, which may hold torch back, and so that no other package changes it.
    pins = folder / "constraints.txt"
    pins.write_text(f"torch=={torch}{'.*' if torch.count('.') == 1 else ''}\n")
    # As an address, since pip takes what has a space in it for two files.
    variables = {"PIP_CONSTRAINT": pins.as_uri(), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    own = clone / ".venv" / "bin" / "python"
    for step, *command in (
        ("git clone", "git", "clone", "--quiet", str(ROOT), str(clone)),
        ("python -m venv", str(python), "-m", "venv", str(clone / ".venv")),
        ("installing torch", str(own), "-m", "pip", "install", "--quiet", "-r", str(pins)),
    ):
        if run(log, *command, cwd=folder, **variables):
            raise Failed(step)
    # For the shell, and before it for make, which reads $ itself.
    arguments = shlex.join(["-q", f"--junitxml={report}", *select]).replace("$", "$$")
    status = run(log, "make", "test", f"PYTHON={python}", f"ARGS={arguments}", cwd=clone, **variables)
    facts = subprocess.run([own, "-c", FACTS], cwd=clone, env=environment(), capture_output=True, text=True)
    if facts.returncode == 0:
        result.columns |= json.loads(facts.stdout.splitlines()[-1])
    if not report.exists():
        raise Failed("make test")
    result.counts = counts(report)
    result.columns |= {name: str(number) for name, number in result.counts.items()}
    if status and not result.counts["failed"]:
        raise Failed("make test")


def one(version: str, torch: str, folder: Path, select: list[str]) -> Result:
    result = Result({"Python": version, "torch": torch})
    python = interpreter(version)
    if isinstance(python, str):
        result.not_run, result.reason = True, f"not run: {python}"
        return result
    folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        build_and_test(python, torch, folder, select, result)
    except Failed as failure:
        result.reason = f"failed: {failure}"
    result.columns["minutes"] = f"{(time.monotonic() - start) / 60:.0f}"
    return result


def table(results: list[Result]) -> str:
    """In Markdown; a pair without counts has its reason in the column of those that passed."""
    rows = [COLUMNS, tuple("---:" if name in COLUMNS[5:] else "---" for name in COLUMNS)]
    for result in results:
        columns = result.columns if not result.reason else result.columns | {"passed": result.reason}
        rows.append(tuple(columns.get(name, "") for name in COLUMNS))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def head() -> str:
    """Which commit is tested, and whether that is all there is."""
    commit, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (("log", "-1", "--format=%h"), ("status", "--porcelain"))
    )
    return f"commit {commit}{'; what is not committed is not tested' if changed else ''}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make matrix ARGS=...", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", type=pair, default=[pair(text) for text in PAIRS], metavar="PYTHON:TORCH")
    parser.add_argument("--select", nargs="+", default=[], metavar="PATH", help="test only these, as given to pytest")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave environments and logs in this new folder")
    options = parser.parse_args(arguments)
    print(head(), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for version, torch in options.pairs:
            folder = (options.keep or Path(temporary)).resolve() / f"python{version}-torch{torch}"
            result = one(version, torch, folder, options.select)
            results.append(result)
            if result.log and not result.good:
                print(*result.log.read_text(errors="replace").splitlines()[-60:], sep="\n")
            said = result.reason or ", ".join(f"{number} {name}" for name, number in result.counts.items())
            print(f"Python {version}, torch {torch}: {said}", flush=True)
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)  # gigabytes each
    print("", table(results), sep="\n")
    return int(any(not (result.good or result.not_run) for result in results) or not any(r.good for r in results))


if __name__ == "__main__":
    sys.exit(main())
