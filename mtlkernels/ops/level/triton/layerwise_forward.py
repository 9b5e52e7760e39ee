"""The forward pass of a layerwise level on NVIDIA GPUs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mtlkernels.ops._triton import Launch, Run, Table, contiguous, launch
from mtlkernels.ops.activations import DICE
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.gated_mixture.triton import Gates
from mtlkernels.ops.level.spec import BATCH_NORM, Groups, LevelSpec
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.launches import LevelShape, execute
from mtlkernels.ops.level.triton.layers import Layer, Layers, Statistics, blocks_of, dice, normalized
from mtlkernels.ops.level.triton.layerwise_kernels import batch_statistics, layer_statistics, layerwise_product


def forward(
    table: Table, spec: LevelSpec, groups: Groups, seed: Tensor | None, save: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference, where layers store pre-activations: K outputs [B, H_L], and what is saved."""
    inputs, weights, biases = map(contiguous, groups[:3])
    x, count, last = inputs[0], len(spec.expert_inputs), len(spec.layers) - 1
    level = LevelShape.of(x, count, [weight.shape[0] for weight in weights[::count]], (*inputs, *weights))
    saved = [level.outputs(table, layer) for layer in range(last + 1)]
    hidden = level.outputs(table, last)
    statistics = [_room(level, table, i, layer.norm) if layer.norm else None for i, layer in enumerate(spec.layers)]
    experts = range(count)
    layers = Layers.of(table, level, spec, groups, seed, statistics, experts)
    values = [table.slices(tensor, experts) for tensor in saved]
    at_weights, at_biases = table.pointers(weights), table.pointers(biases)
    read = [(table.pointers(inputs[stream] for stream in spec.expert_inputs), layers.untouched)]
    read += list(zip(values, layers.each, strict=True))
    runs: list[Run] = []
    for layer, (at, below), value in zip(layers.each, read, values, strict=False):
        first = layer.number * count
        runs += _layer(level, table, layer, below, (at, at_weights + first, at_biases + first, value))
        if layer.spec.activation == DICE and layer.number < last:
            runs.append(dice(level, layer, value, None))
    runs.append(normalized(level, layers.each[last], values[last], table.slices(hidden, experts)))
    gates = Gates(groups.gates, spec.gate_experts, spec.gate_sizes)
    at, shape = mixture.strides(table, hidden, 1, 0), (level.num_rows, level.widths[-1])
    mixed, run = mixture.prepare_forward(table, level.kind, at, x, shape, gates)
    execute(table, x, [*runs, run])
    means, variances = ([pair[i] for pair in statistics if pair is not None] for i in range(2))
    return mixed, [*(saved if save else []), *means, *variances]


def _room(level: LevelShape, table: Table, layer: int, norm: int) -> Statistics:
    """For the means and variances of a layer."""
    shape = (level.num_experts, level.widths[layer + 1] if norm == BATCH_NORM else level.num_rows)
    mean, variance = (table.room(level.like, shape, torch.float32) for _ in range(2))
    return mean, variance


def _layer(
    level: LevelShape,
    table: Table,
    layer: Layer,
    below: Layer,
    operands: tuple[int, int, int, int],
) -> list[Run]:
    """The pre-activations of a layer and the statistics of its norm.

    ``operands``: where what it reads, its weights, its biases and its pre-activations are.
    """
    depth, width = level.widths[layer.number : layer.number + 2]
    tile = tiles.LAYERWISE[level.kind.operands]
    batch = layer.spec.norm == BATCH_NORM
    blocks = triton.cdiv(level.num_rows, tile.rows) if batch else 0
    at_parts = table.pointers([table.room(level.like, (blocks, level.num_experts, 2, width), torch.float32)])
    sizes = (level.num_experts, level.num_rows, width)

    def product(entries: Tensor) -> Launch | None:
        numbers = (*operands, below.place, at_parts, *sizes, depth, *below.numbers)
        constants = {"KIND": level.kind, "LAYER": below.settings, "STATISTICS": batch}
        return launch(layerwise_product, blocks_of(level, tile, width), tile, entries, *numbers, **constants)

    def of_columns(entries: Tensor) -> Launch | None:
        programs = level.num_experts * triton.cdiv(width, tiles.TOTALS.columns)
        return launch(batch_statistics, programs, tiles.TOTALS, entries, at_parts, layer.place, *sizes, tile.rows)

    def of_rows(entries: Tensor) -> Launch | None:
        wide = tiles.VALUES[level.kind.aligned]
        programs = level.num_experts * triton.cdiv(level.num_rows, wide.rows)
        numbers = (operands[-1], layer.place, *sizes)
        return launch(layer_statistics, programs, wide, entries, *numbers, KIND=level.kind.without_products)

    return [product, *([of_columns] if batch else [of_rows] if layer.spec.norm else [])]
