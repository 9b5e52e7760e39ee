"""Parameters of tests that need not meet all of the others' combinations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def in_turns(turns: Sequence[Any], *parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of the parameters, with one of ``turns`` each: every value of each meets all of these."""
    combinations = itertools.product(*(enumerate(values) for values in parameters))
    numbered = [zip(*combination, strict=True) for combination in combinations]
    return [(*values, turns[sum(numbers) % len(turns)]) for numbers, values in numbered]
