"""Runs one target's cases in this process."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import FlakyFailure

from tests.fuzz.targets import Target


@dataclass(frozen=True)
class Finding:
    """A case that fails, as small as it was made, and the error."""

    case: str
    error: str
    module: str
    check: str

    def as_test(self) -> str:
        """A test that fails as long as the error is there."""
        names = sorted(_names(self.case))
        return (
            f"# {self.error.splitlines()[0][:300] if self.error else 'the process ended'}\n"
            f"from tests.fuzz.{self.module} import {', '.join([self.check, *names])}\n\n\n"
            f"def test_found_by_the_fuzzer() -> None:\n    {self.check}({self.case})\n"
        )


def _names(case: str) -> set[str]:
    """The classes that a case's repr names."""
    return set(re.findall(r"\b([A-Z]\w+)\(", case))


def isolated(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The check in a child of a fork, so that the end of the process is an error like another."""

    def in_child(case: Any) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            faulthandler.disable()
            try:
                check(case)
                os._exit(0)
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}"[:4000].encode())
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            raise AssertionError(f"the process ended by {signal.Signals(-status).name}")
        if status:
            raise AssertionError(said)

    return in_child


def run(target: Target, cases: int, seed: int, record: Path | None = None, isolate: bool = False) -> Finding | None:
    """Checks so many random cases; the first that fails, made small, or None.

    Args:
        target: what is called.
        cases: how many.
        seed: of the cases; the same seed gives the same ones.
        record: a file that always holds the case that runs, for whoever looks on from outside.
        isolate: run each case in a child.
    """
    check = isolated(target.check) if isolate else target.check
    last: Any = None
    descriptor = None if record is None else os.open(record, os.O_RDWR | os.O_CREAT)

    @seeded(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    @given(target.cases)
    def every(case: Any) -> None:
        nonlocal last
        last = case
        if descriptor is not None:
            text = repr(case).encode()
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        check(case)

    try:
        every()
    except FlakyFailure as error:
        return finding_of(repr(last), target, f"not each time: {error.exceptions[0]}")
    except Exception as error:
        return finding_of(repr(last), target, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return None


def finding_of(case: str, target: Target, error: str) -> Finding:
    """Of a case's repr."""
    return Finding(case, error, target.check.__module__.rpartition(".")[2], target.check.__name__)
