"""What each launch of a chain has to compute and to move, from the shapes of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from mtlkernels.ops import _triton_splits
from mtlkernels.ops._triton import DTYPES, Kind, Tile
from mtlkernels.ops._triton_splits import Sums
from mtlkernels.ops.activations import CODES, from_input
from mtlkernels.ops.gated_mixture.triton import TILES
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.linear_gates import padded

FLOAT32 = 4  # bytes, as a word of signs has


@dataclass(frozen=True)
class Work:
    """One launch.

    Args:
        kernel: its name.
        flop: the arithmetic of its products, a multiply-add counted as two.
        read: bytes of operands, each once.
        written: bytes of results, each once.
        scratch: bytes that it writes and reads again itself.
    """

    kernel: str
    flop: int
    read: int
    written: int
    scratch: int = 0

    @property
    def traffic(self) -> int:
        """The bytes that have to move at least: scratch stays in the L2 cache."""
        return self.read + self.written


@dataclass(frozen=True)
class Shape:
    """A call of the operators, and the GPU that it runs on.

    Args:
        rows: B.
        widths: features in front of each layer and behind the last.
        expert_inputs, gate_experts, gate_sizes, activations: as the operators'.
        biases: for each layer, how many experts have one.
        dtype, logits_dtype: of everything else, and of the logits.
        precision: of products, see :class:`mtlkernels.ops._triton.Kind`.
        aligned: whether kernels may read whole vectors.
        num_inputs: G.
        card: the GPU.
        gate_inputs: the input that each gate reads that is a linear layer; empty where logits are given.
        gate_biases: elements of the biases of such gates.
    """

    rows: int
    widths: tuple[int, ...]
    expert_inputs: tuple[int, ...]
    gate_experts: tuple[int, ...]
    gate_sizes: tuple[int, ...]
    activations: tuple[int, ...]
    biases: tuple[int, ...]
    dtype: torch.dtype
    logits_dtype: torch.dtype
    precision: str
    aligned: bool
    num_inputs: int
    card: _triton_splits.Card
    gate_inputs: tuple[int, ...] = ()
    gate_biases: int = 0

    @property
    def kind(self) -> Kind:
        return Kind(DTYPES[self.dtype], self.aligned, self.precision)

    @property
    def experts(self) -> int:
        return len(self.expert_inputs)

    @property
    def last(self) -> int:
        return len(self.activations) - 1

    def signs(self, layer: int) -> int:
        """Bytes of the signs of what is in front of a layer above the first, if the forward pass keeps them."""
        relu = 0 < layer <= self.last and self.activations[layer - 1] == CODES["relu"]
        return FLOAT32 * self.experts * self.rows * triton.cdiv(self.widths[layer], 32) if relu else 0

    def hidden(self, layer: int) -> int:
        """Elements in front of a layer, of all experts."""
        return self.experts * self.rows * self.widths[layer] if layer else self.read(True, False)

    @property
    def groups(self) -> list[int]:
        """How many logits the linear gates of each input have that has some."""
        sizes = [0] * self.num_inputs
        for stream, size in zip(self.gate_inputs, self.gate_sizes, strict=False):
            sizes[stream] += size
        return [size for size in sizes if size]

    def read(self, experts: bool, gates: bool) -> int:
        """Elements of the inputs that the experts read, or linear gates, or either."""
        streams = {*(self.expert_inputs if experts else ()), *(self.gate_inputs if gates else ())}
        return len(streams) * self.rows * self.widths[0]

    @property
    def gate_weights(self) -> int:
        return sum(self.groups) * self.widths[0]

    @property
    def grad_logits(self) -> int:
        """Elements of the gradients of linear gates' logits, with the ends of their rows."""
        return self.rows * sum(map(padded, self.groups))

    def weights(self, layer: int) -> int:
        return self.experts * self.widths[layer] * self.widths[layer + 1]

    def product(self, layer: int) -> int:
        """The arithmetic of one product with a layer's weights."""
        return 2 * self.rows * self.weights(layer)

    @property
    def logits(self) -> int:
        """Bytes of all logits."""
        return self.rows * len(self.gate_experts) * self.logits_dtype.itemsize

    @property
    def outputs(self) -> int:
        """Elements of all gates' outputs."""
        return len(self.gate_sizes) * self.rows * self.widths[-1]

    def parts(self, sums: Sums) -> int:
        """How many parts a split launch stores, a block's counted one by one; 0 for one that is not split."""
        count = _triton_splits.splits(sums, self.card.multiprocessors)
        return sums.blocks * count if count > 1 else 0


def forward(shape: Shape, save: bool) -> list[Work]:
    """The launches of a forward pass, in their order."""
    sizes = (len(shape.gate_sizes), shape.experts, shape.rows, shape.widths[-1], shape.widths[-2])
    tile = tiles.mixing(shape.kind, *sizes, shape.activations[-1], save, shape.card)
    layers = shape.last + 1 if tile is None else shape.last
    works = [_layer(shape, layer, save) for layer in range(layers)]
    if shape.groups:
        works[:1] = [_with_gates(shape, works[0] if works else None)]
    return [*works, _mixture(shape) if tile is None else _last(shape, tile, save)]


def backward(
    shape: Shape,
    need_inputs: bool = True,
    need_weights: bool = True,
    need_biases: bool = True,
    need_gate_weights: bool = True,
    need_gate_biases: bool = True,
) -> list[Work]:
    """The launches of a backward pass with the gradients of the logits, in their order.

    The last two are of linear gates alone.
    """
    parameters = (need_weights, need_biases)
    of_gates = (need_gate_weights, need_gate_biases) if shape.groups else (False, False)
    experts = need_inputs or any(parameters)
    works = [_mixture_gradient(shape, experts)]
    works += [_hidden_gradient(shape, layer, need_weights) for layer in range(shape.last, 0, -1) if experts]
    works += [_input_gradient(shape)] if need_inputs else []
    together = parameters == of_gates
    if any(of_gates) and not together:
        works.append(_weight_gradient(shape, *of_gates, experts=False, gates=True))
    return works + ([_weight_gradient(shape, *parameters, experts=True, gates=together)] if any(parameters) else [])


def _operands(shape: Shape, layer: int) -> int:
    """Bytes of what a layer reads: its inputs, weights and biases."""
    biases = shape.biases[layer] * shape.widths[layer + 1]
    return (shape.hidden(layer) + shape.weights(layer) + biases) * shape.dtype.itemsize


def _layer(shape: Shape, layer: int, save: bool) -> Work:
    keep = save and from_input(shape.activations[layer])
    results = shape.hidden(layer + 1) * (2 if keep else 1) * shape.dtype.itemsize
    signs = shape.signs(layer + 1) if save else 0
    return Work("layer_forward", shape.product(layer), _operands(shape, layer), results + signs)


def _with_gates(shape: Shape, layer: Work | None) -> Work:
    """The logits of linear gates, beside the first layer or alone."""
    itemsize = shape.dtype.itemsize
    found = layer or Work("layer_forward", 0, 0, 0)
    streams = shape.read(True, True) - shape.read(True, False) if layer else shape.read(False, True)
    return replace(
        found,
        flop=found.flop + 2 * shape.rows * shape.gate_weights,
        read=found.read + (streams + shape.gate_weights + shape.gate_biases) * itemsize,
        written=found.written + shape.logits,
    )


def _last(shape: Shape, tile: Tile, save: bool) -> Work:
    depth, width = shape.widths[-2:]
    gates = len(shape.gate_sizes)
    sums = tiles.mixing_sums(tile, shape.experts, shape.rows, width, depth, gates, shape.dtype.itemsize)
    results = shape.outputs + (shape.hidden(shape.last + 1) if save else 0)
    return Work(
        "last_forward",
        shape.product(shape.last),
        _operands(shape, shape.last) + shape.logits,
        results * shape.dtype.itemsize,
        shape.parts(sums) * sums.part * FLOAT32,
    )


def _mixture(shape: Shape) -> Work:
    """The mixture, where it is a launch of its own."""
    mixed = len(set(shape.gate_experts)) * shape.rows * shape.widths[-1]
    itemsize = shape.dtype.itemsize
    return Work("mix_forward", 0, mixed * itemsize + shape.logits, shape.outputs * itemsize)


def _mixture_gradient(shape: Shape, need_experts: bool) -> Work:
    """Softmax weights and inner products are scratch."""
    itemsize = shape.dtype.itemsize
    experts = shape.hidden(shape.last + 1) * itemsize
    blocks = triton.cdiv(shape.widths[-1], TILES[shape.aligned].columns)
    scratch = (1 + blocks) * len(shape.gate_experts) * shape.rows * FLOAT32
    read = experts + shape.outputs * itemsize + shape.logits
    logits = shape.grad_logits * itemsize if shape.groups else shape.logits
    return Work("mix_backward", 0, read, logits + (experts if need_experts else 0), scratch)


def _hidden_gradient(shape: Shape, layer: int, need_weights: bool) -> Work:
    """The gradient of the inputs of a layer above the first."""
    code = shape.activations[layer - 1]
    again = need_weights and from_input(code)
    below, itemsize = shape.hidden(layer), shape.dtype.itemsize
    saved = shape.signs(layer) or (below * itemsize if code else 0)
    read = (shape.hidden(layer + 1) + shape.weights(layer)) * itemsize + saved
    return Work("input_gradient", shape.product(layer), read, below * (2 if again else 1) * itemsize)


def _input_gradient(shape: Shape) -> Work:
    """The gradient of those of the level's inputs that are read."""
    width, depth = shape.widths[:2]
    members = [shape.expert_inputs.count(stream) for stream in {*shape.expert_inputs, *shape.gate_inputs}]
    tile, sums = tiles.inputs(shape.kind, members, shape.rows, width, depth, shape.dtype.itemsize, shape.card)
    wide = not shape.parts(sums) and tiles.even_input(shape.kind, tile, width) is not None
    return Work(
        "wide_input_gradient" if wide else "input_gradient",
        shape.product(0) + 2 * shape.rows * shape.gate_weights,
        (shape.hidden(1) + shape.weights(0) + shape.grad_logits + shape.gate_weights) * shape.dtype.itemsize,
        len(members) * shape.rows * width * shape.dtype.itemsize,
        shape.parts(sums) * sums.part * FLOAT32,
    )


def _weight_gradient(shape: Shape, need_weights: bool, need_biases: bool, experts: bool, gates: bool) -> Work:
    """Of the experts' layers, of linear gates, or of both."""
    layers = range(shape.last + 1 if experts else 0)
    groups = shape.groups if gates else []
    # How many there are, their outputs and their inputs.
    parts = [(shape.experts, shape.widths[layer + 1], shape.widths[layer]) for layer in layers]
    parts += [(1, padded(logits), shape.widths[0]) for logits in groups]
    shapes = [(count, h, w if need_weights else 1) for count, h, w in parts]
    tile, sums = tiles.weights(shape.kind, shapes, shape.rows, shape.dtype.itemsize, shape.card)
    # Blocks of all layers, and those of them that add up biases too.
    first = sum(tiles.weight_blocks(tile, count, h, 1) for count, h, _ in parts)
    each = shape.parts(sums) // max(sums.blocks, 1)
    elements = (sums.blocks * tile.columns if need_weights else 0) + (first if need_biases else 0)
    weights = sum(map(shape.weights, layers)) + (shape.gate_weights if groups else 0)
    biases = sum(shape.experts * shape.widths[layer + 1] for layer in layers) + sum(groups)
    read = sum(shape.hidden(layer + 1) for layer in layers) + (shape.grad_logits if groups else 0)
    if need_weights:
        read += shape.read(experts, gates) + sum(shape.hidden(layer) for layer in layers[1:])
    written = (weights if need_weights else 0) + (biases if need_biases else 0)
    return Work(
        "weight_gradient",
        2 * shape.rows * weights if need_weights else 0,
        read * shape.dtype.itemsize,
        written * shape.dtype.itemsize,
        each * elements * tile.rows * FLOAT32,
    )
