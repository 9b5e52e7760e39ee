"""Branches of csrc's lines, and which of them were taken, from what gcov has counted.

gcov counts the branches of each function that was compiled: of every instance of a template, for every instruction set.
Here a branch is one of the source: those that have the same place on a line are one, which is taken if any instance
took it. Where instances have different numbers of branches on a line, those with a multiple of the least are copies of
it; others are other code, as another side of an ``if constexpr`` is, and count by themselves.
:func:`share_of_instances` takes each instance for itself.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.instrumented import COMPILER

# A lambda's operator(), also where its name is too much for the demangler.
LAMBDA = re.compile(r"\{lambda\(|^_Z.*clE")
Instance = tuple[bool, ...]
# By file and number of a line: each instance's branches, and whether it ran.
Counts = Mapping[str, Mapping[int, Sequence[tuple[Instance, bool]]]]


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


def counted(root: Path, under: str) -> Counts:
    """gcov's counts of the objects in ``root``, of files in the folder ``under`` there.

    Branches to the handling of exceptions are left out, as any call has them; so are those on lines of braces alone,
    which are of destructors.
    """
    asked = [str(COMPILER), "-print-prog-name=gcov"]
    gcov = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    objects = sorted(map(str, (root / "build").rglob("*.gcda")))
    done = subprocess.run([gcov, "--json-format", "-b", "--stdout", *objects], stdout=subprocess.PIPE, check=True)
    # A function of several objects is one.
    found: defaultdict[str, defaultdict[int, dict[Any, tuple[Instance, bool]]]] = defaultdict(lambda: defaultdict(dict))
    sources: dict[str, list[str]] = {}
    for number, of_object in enumerate(map(json.loads, done.stdout.splitlines())):
        for file in of_object["files"]:
            path = Path(of_object["current_working_directory"], file["file"]).resolve()
            if not path.is_relative_to(root / under):
                continue
            name = str(path.relative_to(root))
            source = sources.setdefault(name, path.read_text().splitlines())
            for line in file["lines"]:
                text = source[line["line_number"] - 1]
                branches = tuple(branch["count"] > 0 for branch in line["branches"] if not branch["throw"])
                if not text.strip(" {}();,"):
                    branches = ()
                function = line.get("function_name")
                parts = 1 if function else instances_of_lambda(file["functions"], source, line)
                at = found[name][line["line_number"]]
                for i, part in enumerate(of_each(branches, parts)):
                    key = (function or (number, i), len(part))
                    before, ran = at.get(key, ((False,) * len(part), False))
                    either = tuple(a or b for a, b in zip(before, part, strict=True))
                    at[key] = either, ran or line["count"] > 0
    return {name: {line: list(at.values()) for line, at in by_number.items()} for name, by_number in found.items()}


def instances_of_lambda(functions: Sequence[Mapping[str, Any]], source: Sequence[str], line: Mapping[str, Any]) -> int:
    """How many instances of a template's lambda gcov has counted as one on a line within it; elsewhere 1.

    GCC takes them for functions of its own making, which end where they begin.
    """
    starts = [
        (function["start_line"], function["start_column"])
        for function in functions
        if LAMBDA.search(function["demangled_name"]) and function["start_line"] == function["end_line"]
    ]
    inside = [at for at in starts if at[0] < line["line_number"] <= last_line(source, *at)]
    return starts.count(max(inside)) if inside else 1


def last_line(source: Sequence[str], number: int, column: int) -> int:
    """The line on which the braces close that open first at or behind a place."""
    depth = 0
    while number <= len(source):
        for character in source[number - 1][column - 1 :]:
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return number
        number, column = number + 1, 1
    return number


def of_each(branches: Instance, parts: int) -> Iterator[Instance]:
    """The branches of each of several instances that stand one behind another; all as one where they differ."""
    if len(branches) % parts:
        parts = 1
    size = len(branches) // parts
    for part in range(parts):
        yield branches[part * size : (part + 1) * size]


def of_source(instances: Sequence[Instance]) -> Instance:
    """Which branches of a line any instance took."""
    sizes = {len(instance) for instance in instances if instance}
    least = min(sizes, default=0)
    taken: dict[int, list[bool]] = {size: [False] * size for size in sorted(sizes) if size == least or size % least}
    for instance in instances:
        size = len(instance) if len(instance) in taken else least
        for at, branch in enumerate(instance):
            taken[size][at % size] |= branch
    return tuple(branch for branches in taken.values() for branch in branches)


def lines(counts: Counts, root: Path) -> dict[str, list[Line]]:
    """The lines of each file that have code."""
    found = {}
    for file, by_number in sorted(counts.items()):
        source = (root / file).read_text().splitlines()
        found[file] = [
            Line(
                number,
                source[number - 1].strip(),
                any(ran for _, ran in instances),
                of_source([taken for taken, _ in instances]),
            )
            for number, instances in sorted(by_number.items())
        ]
    return found


def share_of_instances(counts: Counts) -> float:
    """The share of branches that were taken, where each instance of a template counts by itself."""
    taken = [
        branch
        for by_number in counts.values()
        for instances in by_number.values()
        for instance, _ in instances
        for branch in instance
    ]
    return sum(taken) / len(taken)
