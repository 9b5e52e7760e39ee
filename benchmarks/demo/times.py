"""The time of a step, of several models in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.harness.timing import Budget, Timing, interleaved


def _call_of(function: Callable[..., object], *args: Tensor) -> Callable[[], None]:
    """The call as the timer wants it, without arguments and result."""

    def call() -> None:
        function(*args)

    return call


def in_turns(
    functions: Mapping[str, Callable[..., object]], inputs: Sequence[Tensor], sizes: Iterable[int], seconds: float
) -> dict[int, dict[str, Timing]]:
    """Batch size -> the time of each function on that many rows of the inputs, in ``seconds`` a size."""
    budget = Budget(seconds=seconds, warmup=seconds / 15, min_rounds=3)
    times = {}
    for size in sizes:
        rows = torch.arange(size) % len(inputs[0])
        given = [tensor[rows] for tensor in inputs]
        calls = {name: _call_of(function, *given) for name, function in functions.items()}
        times[size] = interleaved(calls, torch.device("cpu"), budget)
    return times
