"""The backward pass of the normalized mixture on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mtlkernels.ops._triton import DTYPES, Table, contiguous, launch
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.expert_mixture.triton_backward import groups_of, inputs_gradient, parameters_gradient
from mtlkernels.ops.expert_mixture.triton_level import Level, Run, execute
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.normalized_mixture import triton_tiles as tiles
from mtlkernels.ops.normalized_mixture.triton_gradients import (
    layer_norm_gradient,
    norm_sums,
    norm_totals,
    preactivation_gradient,
)
from mtlkernels.ops.normalized_mixture.triton_layers import Layer, Settings, blocks_of, normalized


def backward(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    saved: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    norms: Sequence[int],
    eps: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_norms: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """As the reference: gradients of the inputs, weights, biases (one a weight), scales, shifts and logits."""
    inputs, weights, saved = contiguous(inputs), contiguous(weights), contiguous(saved)
    grad_outputs = contiguous(grad_outputs)
    x, num_experts, last = inputs[0], len(expert_inputs), len(norms) - 1
    level = Level.of(x, num_experts, [z.shape[2] for z in saved], (*inputs, *weights, *saved, *grad_outputs))
    need_experts = need_inputs or need_weights or need_biases or need_norms
    # The gradient of what each layer gives, then, in its place, that of its pre-activations.
    grads = [torch.empty_like(z) for z in saved] if need_experts else []
    # What the layers give: the last one's for the mixture, the others' for the weights above them.
    hidden = [torch.empty_like(z) if need_weights or i == last else None for i, z in enumerate(saved)]

    table = Table()
    pairs = iter(zip(contiguous(means), contiguous(variances), strict=True))
    statistics = [next(pairs) if norm else None for norm in norms]
    settings = Settings.of(table, num_experts, activations, norms, eps, dropout, seed, scales, shifts, statistics)
    values, at_grads, at_hidden = (
        [table.slices(tensor, num_experts) for tensor in tensors] for tensors in (saved, grads, hidden)
    )
    at_weights = table.pointers(weights)
    runs: list[Run] = [
        normalized(level, layer, values[i], at_hidden[i])
        for i, layer in enumerate(settings.layers)
        if hidden[i] is not None
    ]
    grad_logits, run_mixture = mixture.prepare_backward(
        table,
        level.aligned,
        mixture.strides(table, hidden[-1], 1, 0),
        mixture.strides(table, grads[-1] if grads else None, 1, 0),
        num_experts,
        0,
        grad_outputs,
        gate_logits,
        gate_experts,
        gate_sizes,
        need_experts,
        need_logits,
    )
    runs += [run_mixture] if need_experts or need_logits else []
    grad_inputs = [x.new_empty(stream.shape) for stream in inputs] if need_inputs else []
    grad_scales, grad_shifts = ([_empty(p) if need_norms else None for p in parts] for parts in (scales, shifts))
    scratch: list[Tensor] = []  # the table holds addresses only
    alone = groups_of(table, range(num_experts), num_experts)
    for i in range(last, -1, -1) if need_experts else ():
        own = slice(i * num_experts, (i + 1) * num_experts)
        wanted = (*grad_scales[own], *grad_shifts[own])
        runs += _preactivations(level, table, scratch, settings.layers[i], values[i], at_grads[i], wanted)
        if i:
            operands = (at_grads[i], at_weights + i * num_experts)
            runs.append(inputs_gradient(level, table, i, 0, operands, alone, (at_grads[i - 1], 0, None)))
    if need_inputs:
        groups = groups_of(table, expert_inputs, len(inputs))
        outputs = (table.pointers(grad_inputs), 0, None)
        runs.append(inputs_gradient(level, table, 0, 0, (at_grads[0], at_weights), groups, outputs))
    read = [table.pointers(inputs[stream] for stream in expert_inputs), *at_hidden[:last]]
    grad_weights = [x.new_empty(weight.shape) for weight in weights] if need_weights else []
    grad_biases = [x.new_empty(weight.shape[0]) for weight in weights] if need_biases else []
    if need_weights or need_biases:
        runs.append(parameters_gradient(level, table, at_grads, read, grad_weights, grad_biases))
    execute(table, x, runs)
    # A constant does not move what a batch norm gives.
    unmoved = [grad for i, grad in enumerate(grad_biases) if norms[i // num_experts] == 1]
    if unmoved:
        torch._foreach_zero_(unmoved)
    found = [[g for g in parts if g is not None] for parts in (grad_scales, grad_shifts)]
    return grad_inputs, grad_weights, grad_biases, found[0], found[1], grad_logits


def _empty(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.new_empty(parameter.shape)


def _preactivations(
    level: Level,
    table: Table,
    scratch: list[Tensor],
    layer: Layer,
    values: int,
    grads: int,
    wanted: Sequence[Tensor | None],
) -> list[Run]:
    """From the gradient of what a layer gives, in its place, that of its pre-activations.

    ``wanted``: where the gradients of the scales and then of the shifts go, None for one that is not.
    """
    width = level.widths[layer.number + 1]
    blocks = triton.cdiv(level.num_rows, tiles.SUMS[level.aligned].rows * tiles.SUMS[level.aligned].depth)
    sums = layer.norm_code == 1 or any(grad is not None for grad in wanted)
    for count in (blocks, 1) if sums else (0, 0):
        scratch.append(level.like.new_empty((count, level.num_experts, 2, width), dtype=torch.float32))
    at_parts, at_totals, at_wanted = (table.pointers(part) for part in (scratch[-2:-1], scratch[-1:], wanted))
    common = (values, grads, layer.norm, layer.seed)
    constants: dict[str, Any] = {
        "DTYPE": DTYPES[level.like.dtype],
        "ALIGNED": level.aligned,
        "FROM_INPUT": from_input(layer.activation),
        **layer.constants,
    }
    shape = (level.num_experts, level.num_rows, width)

    def add(entries: Tensor) -> None:
        tile = tiles.SUMS[level.aligned]
        programs = level.num_experts * blocks * triton.cdiv(width, tile.columns)
        launch(norm_sums, programs, tile, entries, *common, at_parts, *shape, *layer.dropout, **constants)

    def add_blocks(entries: Tensor) -> None:
        tile = tiles.TOTALS
        programs = level.num_experts * triton.cdiv(width, tile.columns)
        numbers = (level.num_experts, blocks, width)
        launch(norm_totals, programs, tile, entries, at_parts, at_totals, at_wanted, *numbers, SCALES=layer.scales)

    def columns(entries: Tensor) -> None:
        tile = tiles.VALUES[level.aligned]
        programs = blocks_of(level, tile, width)
        numbers = (*shape, *layer.dropout)
        launch(preactivation_gradient, programs, tile, entries, *common, at_totals, *numbers, **constants)

    def rows(entries: Tensor) -> None:
        tile = tiles.VALUES[level.aligned]
        programs = level.num_experts * triton.cdiv(level.num_rows, tile.rows)
        own = {name: value for name, value in constants.items() if name != "NORM"}
        launch(layer_norm_gradient, programs, tile, entries, *common, *shape, *layer.dropout, **own)

    return [*([add, add_blocks] if sums else []), rows if layer.norm_code == 2 else columns]
