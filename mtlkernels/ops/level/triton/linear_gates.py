"""Gates that are linear layers of a level's inputs: what the experts' launches look up to compute them as well.

The gates that read an input are one product with it: their weights stay where they are, and kernels find each row of
them by an address of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from mtlkernels.ops._triton import Table
from mtlkernels.ops.level.triton.chain_kernels import GATE_COLUMNS
from mtlkernels.ops.level.triton.launches import Parameters

# Rows of the logits' gradients are whole vectors, whatever the gates' sizes: the experts' share the loads' code.
VECTOR = 16


def padded(logits: int) -> int:
    """The length of rows with so many of the logits' gradients."""
    return -(-logits // VECTOR) * VECTOR


def tiles_of(streams: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The programs that compute a block of rows of all logits: each one's input, first logit, and number of logits."""
    low = 0
    for stream, run in groupby(range(len(sizes)), key=lambda k: streams[k]):
        high = low + sum(sizes[k] for k in run)
        for first in range(low, high, GATE_COLUMNS.value):
            yield stream, first, min(GATE_COLUMNS.value, high - first)
        low = high


def rows_of(table: Table, tensors: Sequence[Tensor | None], counts: Sequence[int]) -> int:
    """Appends the addresses of all rows of tensors, so many of each, and returns where they start."""
    start = table.integers(())
    for tensor, count in zip(tensors, counts, strict=True):
        table.slices(tensor, range(count))
    return start


@dataclass(frozen=True)
class LinearGates:
    """K gates: the input that each reads, weights and biases, contiguous; the backward pass knows no biases."""

    inputs: Sequence[Tensor]
    streams: Sequence[int]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None] = ()

    @property
    def sizes(self) -> list[int]:
        """How many logits each has."""
        return [weight.shape[0] for weight in self.weights]

    @property
    def readers(self) -> dict[int, list[int]]:
        """The gates that read each input, of those that some read."""
        return {i: [k for k, stream in enumerate(self.streams) if stream == i] for i in sorted(set(self.streams))}

    def entries(self, table: Table, logits: Tensor) -> tuple[int, int]:
        """Appends what ``gate_layer`` looks up, where logits go; where it starts, and the number of tiles."""
        tiles = list(tiles_of(self.streams, self.sizes))
        start = table.pointers([logits])
        table.integers([logits.shape[1]])
        for stream, first, count in tiles:
            table.pointers([self.inputs[stream]])
            table.integers((first, count))
        rows_of(table, self.weights, self.sizes)
        rows_of(table, self.biases, self.sizes)
        return start, len(tiles)


class GateGradients:
    """The gradients of linear gates' logits, [B, padded] for each input that has gates, and what follows from them.

    ``weights`` and ``biases`` are the gradients that are wanted, or empty.
    """

    def __init__(self, table: Table, gates: LinearGates, need_weights: bool, need_biases: bool) -> None:
        x = gates.inputs[0]
        self.gates, self.readers, self.sizes = gates, gates.readers, gates.sizes
        self.weights = table.together(x, [weight.shape for weight in gates.weights if need_weights])
        self.biases = table.together(x, [weight.shape[:1] for weight in gates.weights if need_biases])
        self.totals = {stream: sum(self.sizes[k] for k in readers) for stream, readers in self.readers.items()}
        self.grads = {stream: table.room(x, (x.shape[0], padded(total))) for stream, total in self.totals.items()}

    def logits(self) -> list[Tensor]:
        """Those of each gate's logits, for the mixture to fill; the last of an input with the rest of its rows."""
        found: dict[int, Tensor] = {}
        for stream, readers in self.readers.items():
            sizes = [self.sizes[k] for k in readers]
            sizes[-1] += padded(self.totals[stream]) - self.totals[stream]
            found.update(zip(readers, self.grads[stream].split(sizes, 1), strict=True))
        return [found[k] for k in range(len(self.sizes))]

    def members(self, table: Table) -> int:
        """Appends what ``input_gradient`` looks up for each input, and returns where it starts."""
        rows = {
            stream: rows_of(table, [self.gates.weights[k] for k in readers], [self.sizes[k] for k in readers])
            for stream, readers in self.readers.items()
        }
        start = table.integers(())
        for stream in range(len(self.gates.inputs)):
            grad = self.grads.get(stream)
            table.pointers([grad])
            table.integers((0, 0, 0) if grad is None else (self.totals[stream], grad.shape[1], rows[stream]))
        return start

    def parameters(self, table: Table) -> list[Parameters]:
        """Appends where the gradients of weights and biases go; an entry for each input that has gates."""
        found = []
        for stream, readers in self.readers.items():
            grad, places = self.grads[stream], []
            for tensors in (self.weights, self.biases):
                wanted = [tensors[k] if tensors else None for k in readers]
                places.append(rows_of(table, wanted, [self.sizes[k] for k in readers]))
                table.integers([0] * (grad.shape[1] - self.totals[stream]))
            read = self.gates.inputs[stream]
            at = (table.pointers([grad]), table.pointers([read]))
            found.append(Parameters(1, grad.shape[1], read.shape[1], *at, *places))
        return found
