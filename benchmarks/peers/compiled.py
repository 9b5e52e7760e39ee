"""The per-expert modules under ``torch.compile``, and frozen to serve."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch._inductor.config as inductor
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


def frozen(source: PerExpertTrunk, x: Tensor) -> tuple[PerExpertTrunk, Forward]:
    """The same to serve inputs like ``x``: weights are constants, packed beforehand, and the kernels are tuned.

    That is chosen where the trunk is compiled, so it is called once here. Nothing of it stays for other contenders.
    """
    trunk = copy.deepcopy(source).eval()
    run: Forward = torch.compile(trunk, dynamic=False, mode="max-autotune")
    with inductor.patch(freezing=True), torch.inference_mode():
        run(x)
    return trunk, run
