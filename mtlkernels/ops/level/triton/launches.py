"""What the launches of a call share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._triton import Kind, Run, Table


class Parameters(NamedTuple):
    """Linear layers of one shape whose weights want gradients: what ``weight_gradient`` looks up.

    How many there are, their outputs and inputs, and places in the table: the gradients of their outputs, their inputs,
    and the gradients of their weights and of their biases.
    """

    members: int
    height: int
    width: int
    grads: int
    read: int
    weights: int
    biases: int


@dataclass(frozen=True)
class LevelShape:
    """Sizes of a level, and what is the same for all of its kernels.

    ``widths`` are the features in front of each layer and behind the last; ``like`` has the dtype and the device.
    """

    like: Tensor
    num_experts: int
    num_rows: int
    widths: tuple[int, ...]
    kind: Kind

    @staticmethod
    def of(x: Tensor, num_experts: int, widths: Iterable[int], tensors: Iterable[Tensor]) -> LevelShape:
        """For inputs like ``x``; ``tensors`` are all that kernels read in whole vectors."""
        lengths = (x.shape[1], *widths)
        return LevelShape(x, num_experts, x.shape[0], lengths, Kind.of(x.dtype, _triton.aligned(tensors, lengths)))

    @property
    def num_layers(self) -> int:
        return len(self.widths) - 1

    def outputs(self, table: Table, layer: int) -> Tensor:
        """Room for what a layer gives, of every expert."""
        return table.room(self.like, (self.num_experts, self.num_rows, self.widths[layer + 1]))


def execute(table: Table, like: Tensor, runs: Sequence[Run]) -> None:
    """Copies the table to the device and launches."""
    with _triton.on_device(like.device):
        entries = table.to(like.device)
        table.launches += [run(entries) for run in runs]
