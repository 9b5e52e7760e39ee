"""What ``make coverage`` makes of gcov's counts."""

from __future__ import annotations

from tests.coverage.branches import of_source
from tests.coverage.exceptions import EXCEPTIONS
from tests.instrumented import ROOT


def test_a_branch_is_taken_if_an_instance_takes_it() -> None:
    assert of_source([(True, False), (False, False), ()]) == (True, False)
    assert of_source([(True, False), (False, True)]) == (True, True)


def test_instances_of_other_code_count_by_themselves() -> None:
    assert of_source([(True, False), (False, True, False)]) == (True, False, False, True, False)


def test_inlined_copies_are_one() -> None:
    assert of_source([(False, False), (True, False, False, False)]) == (True, False)


def test_exceptions_are_of_lines_that_are_there() -> None:
    for file, reasons in EXCEPTIONS.items():
        source = (ROOT / file).read_text()
        for code, reason in reasons.items():
            assert code in source and reason, f"{file}: {code}"
