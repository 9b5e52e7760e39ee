"""Every promise of docs/reliability.md names tests, and these exist; they are what fails where it is broken.

A promise is text, of one paragraph or more, and the line "*Test:*" or "*Tests:*" behind it: files of tests, or tests in
them as pytest names them, without their parameters.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
SUBJECTS = {
    "Accuracy",
    "Determinism",
    "Threads",
    "Forks",
    "Interrupts",
    "Memory",
    "Sizes",
    "Special values",
    "Never stale",
    "Bad input",
    "What is refused",
}
LABEL = re.compile(r"\*Tests?:\*\s")
TEST = re.compile(r"`(?P<path>[^`:]+)(?:::(?P<name>\w+))?`")


@dataclass(frozen=True)
class Promise:
    """What a section says, and its line of tests."""

    section: str
    text: str
    tests: str


def read(page: str) -> list[Promise]:
    """The promises of a page, in its order; what no tests follow has none."""
    found = []
    for section in page.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        text: list[str] = []
        for paragraph in filter(None, map(str.strip, body.split("\n\n"))):
            if LABEL.match(paragraph):
                found.append(Promise(title, "\n\n".join(text), " ".join(paragraph.split()[1:])))
                text = []
            else:
                text.append(paragraph)
        if text:
            found.append(Promise(title, "\n\n".join(text), ""))
    return found


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """The names of a file's tests; none where pytest would not look."""
    file = ROOT / path
    if not (path.startswith("tests/") and file.name.startswith("test_") and file.is_file()):
        return frozenset()
    functions = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))
    return frozenset(function.name for function in functions if function.name.startswith("test_"))


def faults(promise: Promise) -> list[str]:
    """What is wrong with a promise's text and with its line of tests."""
    found = []
    if not promise.text:
        found.append("tests of nothing")
    if not promise.tests:
        found.append("no test")
    for entry in promise.tests.removesuffix(".").split(", ") if promise.tests else []:
        test = TEST.fullmatch(entry)
        if test is None:
            found.append(f"{entry} is no test's name")
        elif not (test["name"] in names_in(test["path"]) if test["name"] else names_in(test["path"])):
            found.append(f"there is no {entry}")
    return found


PROMISES = read(PAGE.read_text())


@pytest.mark.parametrize("promise", PROMISES, ids=[f"{promise.section}-{promise.text[:30]}" for promise in PROMISES])
def test_each_promise_has_tests(promise: Promise) -> None:
    assert not faults(promise), promise.text


def test_no_subject_is_forgotten() -> None:
    titles = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert {promise.section for promise in PROMISES} == set(titles) >= SUBJECTS


@pytest.mark.parametrize(
    ("behind", "fault"),
    [
        ("", "no test"),
        ("*Test:* of course.", "of course is no test's name"),
        ("*Test:* `tests/test_gone.py`.", "there is no `tests/test_gone.py`"),
        ("*Test:* `tests/writers.py`.", "there is no `tests/writers.py`"),
        ("*Test:* `tests/test_routing.py::test_gone`.", "there is no `tests/test_routing.py::test_gone`"),
        ("*Tests:* `tests/test_routing.py`, and hope.", "and hope is no test's name"),
        ("*Test:* `tests/test_routing.py`.\n\nAnd more.", "no test"),
    ],
)
def test_a_promise_without_its_test_is_found(behind: str, fault: str) -> None:
    found = [text for promise in read(f"# Page\n\n## Subject\n\nIt works.\n\n{behind}\n") for text in faults(promise)]
    assert any(fault in text for text in found), found


def test_a_promise_with_its_test_has_no_fault() -> None:
    file = "tests/docs/test_promises.py"
    tests = f"`{file}::test_a_promise_with_its_test_has_no_fault`,\n`{file}`"
    (promise,) = read(f"# Page\n\n## Subject\n\nIt works.\n\n- So does this.\n\n*Tests:* {tests}.\n")
    assert promise.text == "It works.\n\n- So does this." and not faults(promise)
