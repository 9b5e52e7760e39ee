"""How a conversion is held against the library: by the largest of its own errors, of as many runs as that takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.convert import agreement
from tests.convert.agreement import assert_agrees, nudge

EXACT = torch.full((4,), 2.0, dtype=torch.float64)


def result(off: float) -> Any:
    return {"outputs": {"y": (EXACT + off).float()}}


@pytest.mark.parametrize("off, runs", [(1e-3, 1), (1e-2, 2), (1e-1, 3)])
def test_a_run_is_asked_for_where_those_before_it_are_not_enough(
    off: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    noted: list[str] = []
    monkeypatch.setattr(agreement, "note_second_trial", noted.append)

    def originals() -> Iterator[Any]:
        for theirs in (1e-3, 1e-2, 1e-1):
            asked.append(theirs)
            yield result(theirs)

    assert_agrees(result(2 * off), originals(), {"outputs": {"y": EXACT}})
    assert len(asked) == runs and len(noted) == (runs > 1)


def test_an_error_beyond_all_runs() -> None:
    with pytest.raises(AssertionError, match="outputs: y"):
        assert_agrees(result(0.31), iter([result(0.1), result(0.01)]), {"outputs": {"y": EXACT}})


def test_nudged_parameters_are_a_rounding_away() -> None:
    model = torch.nn.Linear(30, 30)
    for parameter, other in zip(model.parameters(), nudge(copy.deepcopy(model), 0).parameters(), strict=True):
        assert not torch.equal(parameter, other)
        torch.testing.assert_close(parameter, other, rtol=torch.finfo(torch.float32).eps, atol=0)
