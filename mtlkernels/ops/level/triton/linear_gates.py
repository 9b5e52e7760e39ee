"""Gates that are linear layers of a level's inputs: what the experts' launches look up to compute them as well.

Gate k reads input k, or the only one. The gates that read an input are one product with it: their weights stay where
they are, and kernels find each row of them by an address of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mtlkernels.ops._triton import Table
from mtlkernels.ops.expert_mixture.triton_kernels import GATE_COLUMNS
from mtlkernels.ops.expert_mixture.triton_level import Parameters

# Rows of the logits' gradients are whole vectors, whatever the gates' sizes: the experts' share the loads' code.
VECTOR = 16


def padded(logits: int) -> int:
    """The length of rows with so many of the logits' gradients."""
    return -(-logits // VECTOR) * VECTOR


def groups_of_gates(gate_sizes: Sequence[int], num_inputs: int) -> list[Sequence[int]]:
    """The sizes of the gates that read each input, as far as there are any."""
    return [gate_sizes] if num_inputs == 1 else [(size,) for size in gate_sizes]


def tiles_of(groups: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """The programs that compute a block of rows of all logits: each one's input, first logit, and number of logits."""
    columns = GATE_COLUMNS.value
    found = []
    low = 0
    for stream, group in enumerate(groups):
        high = low + sum(group)
        found += [(stream, at, min(columns, high - at)) for at in range(low, high, columns)]
        low = high
    return found


@dataclass(frozen=True)
class GateLayers:
    """Inputs, weights and biases of the gates, contiguous, and their logits [B, sum of the sizes], one beside another.

    The backward pass knows no biases.
    """

    inputs: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    logits: Tensor

    @property
    def sizes(self) -> list[int]:
        return [weight.shape[0] for weight in self.weights]

    @property
    def groups(self) -> list[Sequence[int]]:
        return groups_of_gates(self.sizes, len(self.inputs))

    def each(self) -> list[Tensor]:
        """The logits of each gate."""
        return list(self.logits.split(self.sizes, dim=1))

    def entries(self, table: Table) -> tuple[int, int]:
        """Appends what ``gate_layer`` looks up; where it starts, and the number of tiles."""
        tiles = tiles_of(self.groups)
        start = table.pointers([self.logits])
        table.integers([self.logits.shape[1]])
        for stream, first, count in tiles:
            table.integers((self.inputs[stream].data_ptr(), first, count))
        rows_of(table, self.weights, self.sizes)
        rows_of(table, self.biases, self.sizes)
        return start, len(tiles)


def rows_of(table: Table, tensors: Sequence[Tensor | None], counts: Sequence[int]) -> int:
    """Appends the addresses of all rows of tensors, so many of each, and returns where they start."""
    start = table.integers(())
    for tensor, count in zip(tensors, counts, strict=True):
        table.slices(tensor, count)
    return start


@dataclass(frozen=True)
class GateGradients:
    """The gradients of the gates' logits, [B, padded] for each input that has gates, and those that follow from them.

    ``weights`` and ``biases`` are the gradients that are wanted, or empty.
    """

    layers: GateLayers
    grads: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]

    @staticmethod
    def of(layers: GateLayers, need_weights: bool, need_biases: bool) -> GateGradients:
        logits = layers.logits
        grads = [logits.new_empty((logits.shape[0], padded(sum(group)))) for group in layers.groups]
        weights = [w.new_empty(w.shape) for w in layers.weights] if need_weights else []
        return GateGradients(layers, grads, weights, [w.new_empty(w.shape[0]) for w in layers.weights if need_biases])

    def each(self) -> list[Tensor]:
        """Those of each gate's logits, for the mixture to fill; the last of an input with the rest of its rows."""
        found = []
        for grad, group in zip(self.grads, self.layers.groups, strict=True):
            *sizes, last = group
            found += grad.split([*sizes, last + grad.shape[1] - sum(group)], dim=1)
        return found

    def members(self, table: Table) -> int:
        """Appends what ``input_gradient`` looks up for each input, and returns where it starts."""
        at = rows_of(table, self.layers.weights, self.layers.sizes)
        entries: list[int] = []
        for grad, group in zip(self.grads, self.layers.groups, strict=True):
            entries += [grad.data_ptr(), sum(group), grad.shape[1], at]
            at += sum(group)
        return table.integers([*entries, *[0] * (4 * (len(self.layers.inputs) - len(self.grads)))])

    def parameters(self, table: Table) -> list[Parameters]:
        """Appends where the gradients of weights and biases go; an entry for each input that has gates."""
        found = []
        low = 0
        for stream, (grad, group) in enumerate(zip(self.grads, self.layers.groups, strict=True)):
            gates = slice(low, low + len(group))
            low += len(group)
            places = []
            for tensors in (self.weights[gates], self.biases[gates]):
                places.append(rows_of(table, tensors or [None] * len(group), group))
                table.integers([0] * (grad.shape[1] - sum(group)))
            at_grad, read = table.pointers([grad]), table.pointers([self.layers.inputs[stream]])
            width = self.layers.inputs[stream].shape[1]
            found.append(Parameters(1, grad.shape[1], width, at_grad, read, *places))
        return found
