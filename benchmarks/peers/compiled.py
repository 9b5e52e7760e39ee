"""The per-expert modules under ``torch.compile``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.per_expert import PerExpertTrunk

Forward = Callable[[Tensor], tuple[Tensor, ...]]


def compiled(source: PerExpertTrunk, *, cuda_graphs: bool = False) -> tuple[PerExpertTrunk, Forward]:
    """A copy of the trunk, and the function that evaluates it, specialised on the shapes that it first meets."""
    trunk = copy.deepcopy(source)
    run: Forward = torch.compile(trunk, dynamic=False, mode="reduce-overhead" if cuda_graphs else "default")
    if not cuda_graphs:
        return trunk, run

    def run_graph(x: Tensor) -> tuple[Tensor, ...]:
        # The outputs of the step before are no longer wanted.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return run(x)

    return trunk, run_graph
