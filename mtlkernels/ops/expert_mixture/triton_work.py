"""What each launch of the expert mixture has to compute and to move, from the shapes of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from mtlkernels.ops import _triton_splits
from mtlkernels.ops._triton import Tile
from mtlkernels.ops._triton_splits import Sums
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.expert_mixture import triton_tiles as tiles
from mtlkernels.ops.gated_mixture.triton import TILES

FLOAT32 = 4


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
        precision: of products, see :func:`mtlkernels.ops._triton.precision`.
        aligned: whether kernels may read whole vectors.
        num_inputs: G.
        multiprocessors: how many the GPU has.
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
    multiprocessors: int

    @property
    def kind(self) -> tuple[str, bool]:
        return tiles.operands(self.dtype, self.precision), self.aligned

    @property
    def experts(self) -> int:
        return len(self.expert_inputs)

    @property
    def last(self) -> int:
        return len(self.activations) - 1

    def hidden(self, layer: int) -> int:
        """Elements in front of a layer, of all experts."""
        streams = self.experts if layer else len(set(self.expert_inputs))
        return streams * self.rows * self.widths[layer]

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
        count = _triton_splits.splits(sums, self.multiprocessors)
        return sums.blocks * count if count > 1 else 0


def forward(shape: Shape, save: bool) -> list[Work]:
    """The launches of a forward pass, in their order."""
    tile = tiles.mixing(*shape.kind, len(shape.gate_sizes), shape.rows)
    if tile is None:
        every = [_layer(shape, layer, save) for layer in range(shape.last + 1)]
        return [*every, _mixture(shape)]
    return [*(_layer(shape, layer, save) for layer in range(shape.last)), _last(shape, tile, save)]


def backward(shape: Shape, need_inputs: bool = True, need_weights: bool = True, need_biases: bool = True) -> list[Work]:
    """The launches of a backward pass with the gradients of the logits, in their order."""
    parameters = need_weights or need_biases
    experts = need_inputs or parameters
    works = [_mixture_gradient(shape, experts)]
    works += [_hidden_gradient(shape, layer, need_weights) for layer in range(shape.last, 0, -1) if experts]
    works += [_input_gradient(shape)] if need_inputs else []
    return works + ([_weight_gradient(shape, need_weights, need_biases)] if parameters else [])


def _operands(shape: Shape, layer: int) -> int:
    """Bytes of what a layer reads: its inputs, weights and biases."""
    biases = shape.biases[layer] * shape.widths[layer + 1]
    return (shape.hidden(layer) + shape.weights(layer) + biases) * shape.dtype.itemsize


def _layer(shape: Shape, layer: int, save: bool) -> Work:
    keep = save and from_input(shape.activations[layer])
    results = shape.hidden(layer + 1) * (2 if keep else 1) * shape.dtype.itemsize
    return Work("layer_forward", shape.product(layer), _operands(shape, layer), results)


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
    return Work("mix_backward", 0, read, shape.logits + (experts if need_experts else 0), scratch)


def _hidden_gradient(shape: Shape, layer: int, need_weights: bool) -> Work:
    """The gradient of the inputs of a layer above the first."""
    code = shape.activations[layer - 1]
    again = need_weights and from_input(code)
    below = shape.hidden(layer)
    read = shape.hidden(layer + 1) + shape.weights(layer) + (below if code else 0)
    itemsize = shape.dtype.itemsize
    return Work("input_gradient", shape.product(layer), read * itemsize, below * (2 if again else 1) * itemsize)


def _input_gradient(shape: Shape) -> Work:
    """The gradient of the level's inputs."""
    width, depth = shape.widths[:2]
    members = [shape.expert_inputs.count(stream) for stream in range(shape.num_inputs)]
    tile = tiles.product(*shape.kind, shape.rows, width)
    sums = tiles.input_sums(tile, members, shape.rows, width, depth, shape.dtype.itemsize)
    return Work(
        "input_gradient",
        shape.product(0),
        (shape.hidden(1) + shape.weights(0)) * shape.dtype.itemsize,
        shape.num_inputs * shape.rows * width * shape.dtype.itemsize,
        shape.parts(sums) * sums.part * FLOAT32,
    )


def _weight_gradient(shape: Shape, need_weights: bool, need_biases: bool) -> Work:
    tile = tiles.WEIGHT_GRADIENT[shape.kind]
    layers = range(shape.last + 1)
    pairs: Sequence[tuple[int, int]] = list(zip(shape.widths, shape.widths[1:], strict=False))
    # Blocks of all layers, and those of them that add up biases too.
    blocks = sum(tiles.weight_blocks(tile, shape.experts, h, w if need_weights else 1) for w, h in pairs)
    first = sum(tiles.weight_blocks(tile, shape.experts, h, 1) for _, h in pairs)
    sums = tiles.weight_sums(tile, blocks, shape.rows, shape.dtype.itemsize)
    each = shape.parts(sums) // max(blocks, 1)
    elements = (blocks * tile.columns if need_weights else 0) + (first if need_biases else 0)
    read = sum(shape.hidden(layer + 1) + (shape.hidden(layer) if need_weights else 0) for layer in layers)
    written = sum(shape.weights(layer) for layer in layers) if need_weights else 0
    written += shape.experts * sum(shape.widths[1:]) if need_biases else 0
    return Work(
        "weight_gradient",
        sum(map(shape.product, layers)) if need_weights else 0,
        read * shape.dtype.itemsize,
        written * shape.dtype.itemsize,
        each * elements * tile.rows * FLOAT32,
    )
