"""Trunks in CUDA graphs: what someone does who wants the host out of the way. Never run yet, for want of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], tuple[Tensor, ...]]


def graphed(trunk: nn.Module, x: Tensor, training: bool) -> Forward:
    """The trunk's forward pass, and in training its backward pass, captured for inputs like ``x``."""
    if training:
        run: Any = torch.cuda.make_graphed_callables(trunk, (x.detach().clone().requires_grad_(),))
        return run  # type: ignore[no-any-return]
    given = x.detach().clone()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(aside):
        for _ in range(3):  # what compiles, or tunes, or records
            trunk(given)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        outputs = trunk(given)

    def replay(inputs: Tensor) -> tuple[Tensor, ...]:
        given.copy_(inputs)
        graph.replay()
        return tuple(outputs)

    return replay
