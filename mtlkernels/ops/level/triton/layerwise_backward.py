"""The backward pass of the normalized mixture on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mtlkernels.ops._triton import DTYPES, Table, contiguous, launch
from mtlkernels.ops.activations import DICE, from_input, has_slopes
from mtlkernels.ops.expert_mixture.triton_backward import groups_of, inputs_gradient, parameters_gradient
from mtlkernels.ops.expert_mixture.triton_level import Level, Run, execute
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.normalized_mixture import triton_tiles as tiles
from mtlkernels.ops.normalized_mixture.reference import check_parts
from mtlkernels.ops.normalized_mixture.triton_dice import dice_gradient_rows
from mtlkernels.ops.normalized_mixture.triton_gradients import (
    layer_norm_gradient,
    norm_sums,
    norm_totals,
    preactivation_gradient,
    slope_totals,
)
from mtlkernels.ops.normalized_mixture.triton_layers import Layer, Settings, blocks_of, dice, normalized


def backward(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
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
    dice_eps: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_norms: bool,
    need_slopes: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """As the reference: gradients of the inputs, weights, biases (one a weight), scales, shifts, slopes and logits."""
    check_parts(activations, norms, scales, shifts, slopes)
    inputs, weights, saved = contiguous(inputs), contiguous(weights), contiguous(saved)
    grad_outputs = contiguous(grad_outputs)
    x, num_experts, last = inputs[0], len(expert_inputs), len(norms) - 1
    level = Level.of(x, num_experts, [z.shape[2] for z in saved], (*inputs, *weights, *saved, *grad_outputs))
    need_experts = need_inputs or need_weights or need_biases or need_norms or need_slopes
    # The gradient of what each layer gives, then, in its place, that of its pre-activations.
    grads = [torch.empty_like(z) for z in saved] if need_experts else []
    # What the layers give: the last one's for the mixture, the others' for the weights above them.
    hidden = [torch.empty_like(z) if need_weights or i == last else None for i, z in enumerate(saved)]

    table = Table()
    pairs = iter(zip(contiguous(means), contiguous(variances), strict=True))
    statistics = [next(pairs) if norm else None for norm in norms]
    numbers = (activations, norms, eps, dice_eps, dropout)
    settings = Settings.of(table, level, *numbers, seed, (scales, shifts, slopes), statistics)
    values, at_grads, at_hidden = (
        [table.slices(tensor, num_experts) for tensor in tensors] for tensors in (saved, grads, hidden)
    )
    at_weights = table.pointers(weights)
    runs: list[Run] = []
    for i, layer in enumerate(settings.layers):
        if hidden[i] is not None:
            runs.append(normalized(level, layer, values[i], at_hidden[i]))
        elif layer.activation == DICE and need_experts:
            runs.append(dice(level, layer, values[i], None))
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
    needs = (need_norms, need_norms, need_slopes)
    found = [_room(parts, need, settings.dtype) for parts, need in zip((shifts, scales, slopes), needs, strict=True)]
    shared: list[tuple[Tensor, Tensor]] = []
    scratch: list[Tensor] = []  # the table holds addresses only
    alone = groups_of(table, range(num_experts), num_experts)
    for i in range(last, -1, -1) if need_experts else ():
        own = slice(i * num_experts, (i + 1) * num_experts)
        wanted = [part[own] for part in found]
        runs += _preactivations(level, table, scratch, shared, settings.layers[i], values[i], at_grads[i], wanted)
        if i:
            operands = (at_grads[i], at_weights + i * num_experts)
            runs.append(inputs_gradient(level, table, i, 0, operands, alone, (at_grads[i - 1], 0, None)))
    runs += [_shared_slopes(table, shared, settings)] if shared else []
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
    # A constant does not move what a batch norm gives; a NaN stays.
    unmoved = [grad for i, grad in enumerate(grad_biases) if norms[i // num_experts] == 1]
    if unmoved:
        torch._foreach_mul_(unmoved, 0.0)
    grad_shifts, grad_scales, grad_slopes = (
        [grad.to(p.dtype) for grad, p in zip(grads, parts, strict=True) if grad is not None and p is not None]
        for grads, parts in zip(found, (shifts, scales, slopes), strict=True)
    )
    return grad_inputs, grad_weights, grad_biases, grad_scales, grad_shifts, grad_slopes, grad_logits


def _room(parameters: Sequence[Tensor | None], need: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """Where kernels write gradients: in the dtype in which they read the parameters."""
    return [p.new_empty(p.shape, dtype=dtype) if need and p is not None else None for p in parameters]


def _preactivations(
    level: Level,
    table: Table,
    scratch: list[Tensor],
    shared: list[tuple[Tensor, Tensor]],
    layer: Layer,
    values: int,
    grads: int,
    wanted: Sequence[Sequence[Tensor | None]],
) -> list[Run]:
    """From the gradient of what a layer gives, in its place, that of its pre-activations.

    ``wanted``: where the gradients of the shifts, scales and slopes go, None for one that is not. To ``shared`` the
    totals of slopes that all channels share are added, and where their gradients go.
    """
    width = level.widths[layer.number + 1]
    blocks = triton.cdiv(level.num_rows, tiles.SUMS[level.aligned].rows * tiles.SUMS[level.aligned].depth)
    sums = layer.norm_code == 1 or any(grad is not None for part in wanted for grad in part)
    for count in (blocks, 1) if sums else (0, 0):
        scratch.append(level.like.new_empty((count, level.num_experts, 3, width), dtype=torch.float32))
    at_parts, at_totals = table.pointers(scratch[-2:-1]), table.pointers(scratch[-1:])
    shifts, scales, slopes = wanted
    one = [grad is not None and grad.numel() == 1 for grad in slopes]
    shared += ((scratch[-1][0, e, 2], grad) for e, grad in enumerate(slopes) if grad is not None and one[e])
    by_channel = [None if one[e] else grad for e, grad in enumerate(slopes)]
    at_wanted = table.pointers((*shifts, *scales, *by_channel))
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
        own = {"SCALES": layer.scales, "SUMS": 3 if has_slopes(layer.activation) else 2}
        launch(norm_totals, programs, tile, entries, at_parts, at_totals, at_wanted, *numbers, **own)

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

    def dice_sums(entries: Tensor) -> None:
        tile = tiles.VALUES[level.aligned]
        programs = level.num_experts * triton.cdiv(level.num_rows, tile.rows)
        own = {name: value for name, value in constants.items() if name != "FROM_INPUT"}
        launch(dice_gradient_rows, programs, tile, entries, *common, *shape, *layer.dropout, **own)

    runs = [dice_sums] if layer.activation == DICE else []
    return [*runs, *([add, add_blocks] if sums else []), rows if layer.norm_code == 2 else columns]


def _shared_slopes(table: Table, shared: Sequence[tuple[Tensor, Tensor]], settings: Settings) -> Run:
    """The gradients of slopes that all channels share: pairs of the totals of the channels and where the sum goes."""
    totals, grads = zip(*shared, strict=True)
    places = (table.pointers(totals), table.pointers(grads), table.integers(total.numel() for total in totals))

    def run(entries: Tensor) -> None:
        launch(slope_totals, len(totals), tiles.SLOPES, entries, *places, SCALES=DTYPES[settings.dtype])

    return run
