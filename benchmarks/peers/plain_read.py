"""Reading as many bytes as some work moves at least, and nothing else: how far the work itself could come.

The harness measures the rate of a plain read once a run. A shared machine's changes from minute to minute, so where the
share of it is the figure that counts, a read takes its turn among the contenders. Which way to read is the fastest
changes too: sums and maxima each have a turn, and the faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

ROWS = 1024  # of the buffer, as a matrix
# What a pass over its rows computes.
WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {"sums": lambda x: x.sum(1), "maxima": lambda x: x.amax(1)}


class PlainRead:
    """Reads ``traffic`` bytes: a buffer of half of them twice, as PCGrad has to read its gradients two times.

    What a cache keeps from one reading to the next, it so keeps for both.
    """

    def __init__(self, traffic: float, device: torch.device, way: str) -> None:
        self.way = way
        columns = max(1, round(traffic / (2 * ROWS * torch.float32.itemsize)))
        self.buffer = torch.ones(ROWS, columns, device=device)
        self.outputs: Sequence[Tensor] = ()

    def forget(self) -> None:
        self.outputs = ()

    def __call__(self) -> None:
        self.forget()
        read = WAYS[self.way]
        self.outputs = (read(self.buffer), read(self.buffer))

    def results(self) -> Mapping[str, Tensor]:
        """What shows that all was read: the mean, or the largest, of each row of ones."""
        found = torch.stack(tuple(self.outputs))
        return {"update": found / self.buffer.shape[1] if self.way == "sums" else found}


def whole() -> Mapping[str, Tensor]:
    """What :meth:`PlainRead.results` have to be."""
    return {"update": torch.ones(2, ROWS, dtype=torch.float64)}
