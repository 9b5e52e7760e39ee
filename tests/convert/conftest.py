"""Fixtures of the conversion tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import mtlkernels as mk
import mtlkernels._convert.evaluation


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of experts of each fused call."""
    calls: list[int] = []

    def counted(inputs: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(weights[0]))
        return mk.expert_mixture(inputs, weights, *args, **kwargs)

    monkeypatch.setattr(mtlkernels._convert.evaluation, "expert_mixture", counted)
    yield calls
