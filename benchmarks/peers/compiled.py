"""The per-expert modules under ``torch.compile``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.per_expert import PerExpertTrunk

Forward = Callable[[Tensor], tuple[Tensor, ...]]


def compiled(source: PerExpertTrunk, mode: str = "default") -> tuple[PerExpertTrunk, Forward]:
    """A copy of the trunk, and the function that evaluates it, specialised on the shapes that it first meets.

    On a GPU all modes of ``torch.compile`` but the default take CUDA graphs.
    """
    trunk = copy.deepcopy(source)
    run: Forward = torch.compile(trunk, dynamic=False, mode=mode)
    if mode == "default":
        return trunk, run

    def run_graph(x: Tensor) -> tuple[Tensor, ...]:
        # The outputs of the step before are no longer wanted.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return run(x)

    return trunk, run_graph
