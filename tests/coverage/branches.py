"""Branches of csrc's lines, and which of them were taken, from what gcov has counted.

gcov counts the branches of each function that was compiled: of every instance of a template, for every instruction set,
and of a function that is always inlined in each that calls it. Here a branch is one of the source: those that have the
same place on a line are one, which is taken if any instance took it. Where instances have different numbers of branches
on a line, those with a multiple of the least are copies of it, inlined; others are other code, as another side of an
``if constexpr`` is, and count by themselves. :func:`share_of_instances` takes each instance for itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.instrumented import COMPILER


@dataclass(frozen=True)
class Line:
    """A line of source: whether it ran, and of each of its branches whether it was taken."""

    number: int
    text: str
    ran: bool
    taken: tuple[bool, ...]

    @property
    def missed(self) -> int:
        return self.taken.count(False)


def counted(root: Path, under: str) -> dict[str, Any]:
    """gcov's counts of the objects in ``root``, as gcovr gives them.

    Branches to the handling of exceptions are left out, as any call has them; so are those on lines of a brace alone.
    """
    gcov = subprocess.run([str(COMPILER), "-print-prog-name=gcov"], capture_output=True, text=True, check=True).stdout
    command = [
        sys.executable, "-m", "gcovr", "--root", str(root), "--filter", f"{under}/",
        "--gcov-executable", gcov.strip(), "-j", "0",
        "--json", "-", "--exclude-throw-branches", "--exclude-unreachable-branches",
        "--merge-mode-functions", "separate", str(root / "build"),
    ]  # fmt: skip
    counts: dict[str, Any] = json.loads(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout)
    return counts


def of_instance(line: dict[str, Any]) -> tuple[bool, ...]:
    """Which branches of a line an instance of it took, in the order of its code."""
    return tuple(branch["count"] > 0 for branch in line["branches"] if not branch.get("gcovr/excluded"))


def of_source(instances: Sequence[tuple[bool, ...]]) -> tuple[bool, ...]:
    """Which branches of a line any instance took."""
    sizes = {len(instance) for instance in instances if instance}
    least = min(sizes, default=0)
    taken: dict[int, list[bool]] = {size: [False] * size for size in sorted(sizes) if size == least or size % least}
    for instance in instances:
        size = len(instance) if len(instance) in taken else least
        for at, branch in enumerate(instance):
            taken[size][at % size] |= branch
    return tuple(branch for branches in taken.values() for branch in branches)


def lines(counts: dict[str, Any], root: Path) -> dict[str, list[Line]]:
    """The lines of each file that have code."""
    found = {}
    for file in counts["files"]:
        instances: dict[int, list[tuple[bool, ...]]] = defaultdict(list)
        ran: dict[int, bool] = defaultdict(bool)
        for line in file["lines"]:
            instances[line["line_number"]].append(of_instance(line))
            ran[line["line_number"]] |= line["count"] > 0
        source = (root / file["file"]).read_text().splitlines()
        found[file["file"]] = [
            Line(number, source[number - 1].strip(), ran[number], of_source(instances[number]))
            for number in sorted(instances)
        ]
    return found


def share_of_instances(counts: dict[str, Any]) -> float:
    """The share of branches that were taken, where each instance of a template counts by itself."""
    taken = [taken for file in counts["files"] for line in file["lines"] for taken in of_instance(line)]
    return sum(taken) / len(taken)
