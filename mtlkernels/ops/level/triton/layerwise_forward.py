"""The forward pass of the normalized mixture on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mtlkernels.ops._triton import DTYPES, Table, contiguous, launch
from mtlkernels.ops.activations import DICE
from mtlkernels.ops.expert_mixture.triton_level import Level, Run, execute
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.normalized_mixture import triton_tiles as tiles
from mtlkernels.ops.normalized_mixture.reference import check_parts
from mtlkernels.ops.normalized_mixture.triton_kernels import batch_statistics, layer_statistics, normalized_layer
from mtlkernels.ops.normalized_mixture.triton_layers import Layer, Settings, blocks_of, dice, normalized, statistics_of


def forward(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    norms: Sequence[int],
    eps: Sequence[float],
    dice_eps: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """As the reference: K outputs [B, H_L], a [E, B, H] tensor a layer, means and variances."""
    check_parts(activations, norms, scales, shifts, slopes)
    inputs, weights = contiguous(inputs), contiguous(weights)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    x, num_experts, last = inputs[0], len(expert_inputs), len(norms) - 1
    widths = [weights[layer * num_experts].shape[0] for layer in range(last + 1)]
    level = Level.of(x, num_experts, widths, (*inputs, *weights))
    saved = [x.new_empty((num_experts, x.shape[0], width)) for width in widths]
    statistics = statistics_of(level, norms)
    hidden = torch.empty_like(saved[-1])

    table = Table()
    numbers = (activations, norms, eps, dice_eps, dropout)
    settings = Settings.of(table, level, *numbers, seed, (scales, shifts, slopes), statistics)
    values = [table.slices(tensor, num_experts) for tensor in saved]
    at_weights, at_biases = table.pointers(weights), table.pointers(biases)
    untouched = Layer(0, 0, 0, 0.0, 0.0, 0.0, 0, 0, settings.layers[0].scales)
    read = [(table.pointers(inputs[stream] for stream in expert_inputs), untouched)]
    read += list(zip(values, settings.layers, strict=True))
    runs: list[Run] = []
    scratch: list[Tensor] = []  # the table holds addresses only
    for layer in range(last + 1):
        at, below = read[layer]
        operands = (at, at_weights + layer * num_experts, at_biases + layer * num_experts, values[layer])
        runs += _layer(level, table, scratch, settings.layers[layer], below, operands)
        if activations[layer] == DICE and layer < last:
            runs.append(dice(level, settings.layers[layer], values[layer], None))
    outputs = table.slices(hidden, num_experts)
    runs.append(normalized(level, settings.layers[last], values[last], outputs))
    at = mixture.strides(table, hidden, 1, 0)
    gates = (gate_logits, gate_experts, gate_sizes)
    mixed, run = mixture.prepare_forward(table, level.aligned, at, x, (x.shape[0], widths[-1]), *gates)
    execute(table, x, [*runs, run])
    found = [pair for pair in statistics if pair is not None]
    return mixed, saved, [mean for mean, _ in found], [variance for _, variance in found]


def _layer(
    level: Level,
    table: Table,
    scratch: list[Tensor],
    layer: Layer,
    below: Layer,
    operands: tuple[int, int, int, int],
) -> list[Run]:
    """The pre-activations of a layer and the statistics of its norm.

    ``operands``: where what it reads, its weights, its biases and its pre-activations are.
    """
    depth, width = level.widths[layer.number : layer.number + 2]
    tile = tiles.LAYER[level.kind]
    batch = layer.norm_code == 1
    blocks = triton.cdiv(level.num_rows, tile.rows) if batch else 0
    scratch.append(level.like.new_empty((blocks, level.num_experts, 2, width), dtype=torch.float32))
    at_parts = table.pointers(scratch[-1:])

    def product(entries: Tensor) -> None:
        launch(
            normalized_layer,
            blocks_of(level, tile, width),
            tile,
            entries,
            *operands,
            below.norm,
            below.seed,
            at_parts,
            level.num_experts,
            level.num_rows,
            width,
            depth,
            *below.dropout,
            **level.constants,
            **below.constants,
            STATISTICS=batch,
        )

    def of_columns(entries: Tensor) -> None:
        programs = level.num_experts * triton.cdiv(width, tiles.TOTALS.columns)
        sizes = (level.num_experts, level.num_rows, width, tile.rows)
        launch(batch_statistics, programs, tiles.TOTALS, entries, at_parts, layer.norm, *sizes)

    def of_rows(entries: Tensor) -> None:
        wide = tiles.VALUES[level.aligned]
        programs = level.num_experts * triton.cdiv(level.num_rows, wide.rows)
        sizes = (level.num_experts, level.num_rows, width)
        constants = {"DTYPE": DTYPES[level.like.dtype], "ALIGNED": level.aligned}
        launch(layer_statistics, programs, wide, entries, operands[-1], layer.norm, *sizes, **constants)

    return [product, *([of_columns] if batch else [of_rows] if layer.norm_code else [])]
