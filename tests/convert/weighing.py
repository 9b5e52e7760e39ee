"""A level whose gates' shares are made in a method of their own, for classes that do something else there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.test_edits import Home

X = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


class Level(Home):
    """Whose shares are made in the place of its logits' softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def prepare(self) -> None:
        """What a class below keeps."""

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [(self.weigh(gate(x)).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def agree(model: nn.Module, other: nn.Module) -> None:
    """Whether both give the same for :data:`X`."""
    for y, right in zip(model(X), other(X), strict=True):
        torch.testing.assert_close(y, right)


def assert_compiled_sees(
    kind: type[nn.Module], edit: Callable[[Any], object], fused_calls: list[int], fused: bool
) -> None:
    """That a converted model compiles into one graph, ``fused`` or not, and into its own code's after an edit."""
    model, own = kind(), kind()
    assert mk.convert(model).replaced
    own.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    agree(compiled, own)
    assert bool(fused_calls) == fused
    fused_calls.clear()
    for each in (model, own):
        edit(each)
    agree(compiled, own)
    assert not fused_calls
