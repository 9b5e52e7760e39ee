"""The backward pass of a layerwise level on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mtlkernels.ops._triton import DTYPES, Launch, Run, Table, contiguous, launch
from mtlkernels.ops.activations import DICE, has_slopes
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.gated_mixture.triton import Gates
from mtlkernels.ops.level.spec import BATCH_NORM, LAYER_NORM, Groups, LevelSpec
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.chain_backward import inputs_gradient, members_of, parameters_gradient
from mtlkernels.ops.level.triton.dice_kernels import dice_gradient_rows
from mtlkernels.ops.level.triton.launches import LevelShape, execute
from mtlkernels.ops.level.triton.layers import Layer, Layers, blocks_of, dice, normalized
from mtlkernels.ops.level.triton.layerwise_gradients import (
    layer_norm_gradient,
    norm_sums,
    norm_totals,
    preactivation_gradient,
    slope_totals,
)


def backward(
    table: Table,
    spec: LevelSpec,
    grad_outputs: Sequence[Tensor],
    groups: Groups,
    saved: Sequence[Tensor],
    statistics: Sequence[Tensor],
    seed: Tensor | None,
    needs: Groups,
) -> Groups:
    """As that of a chain, with the ``statistics`` of norms: all means, then all variances."""
    inputs, weights, saved, grad_outputs = map(contiguous, (groups.inputs, groups.weights, saved, grad_outputs))
    x, count, last = inputs[0], len(spec.expert_inputs), len(spec.layers) - 1
    level = LevelShape.of(x, count, [z.shape[2] for z in saved], (*inputs, *weights, *saved, *grad_outputs))
    need_experts = any(needs[:6])
    # The gradient of what each layer gives, then, in its place, that of its pre-activations.
    grads = [level.outputs(table, i) for i in range(last + 1)] if need_experts else []
    # What the layers give: the last one's for the mixture, the others' for the weights above them.
    hidden = [level.outputs(table, i) if needs.weights or i == last else None for i in range(last + 1)]
    experts, means = range(count), contiguous(statistics)
    pairs = iter(zip(means, means[len(means) // 2 :], strict=False))
    layers = Layers.of(
        table, level, spec, groups, seed, [next(pairs) if layer.norm else None for layer in spec.layers], spec.numbers
    )
    values = [table.slices(tensor, spec.numbers) for tensor in saved]
    at_grads, at_hidden = ([table.slices(tensor, experts) for tensor in tensors] for tensors in (grads, hidden))
    at_weights = table.pointers(weights)
    runs: list[Run] = []
    for layer, value, at, room in zip(layers.each, values, at_hidden, hidden, strict=True):
        if room is not None:
            runs.append(normalized(level, layer, value, at))
        elif layer.spec.activation == DICE and need_experts:
            runs.append(dice(level, layer, value, None))
    logits = [table.room(x, t.shape, t.dtype) for t in groups.gates if needs.gates]
    features = mixture.strides(table, hidden[-1], 1, 0), mixture.strides(table, grads[-1] if grads else None, 1, 0)
    gates = Gates(groups.gates, spec.gate_experts, spec.gate_sizes)
    offsets = [e * level.num_rows * level.widths[-1] for e in experts]
    runs.append(
        mixture.prepare_backward(table, level.kind, features, offsets, 0, grad_outputs, gates, need_experts, logits)
    )
    scales, shifts, slopes = (
        _like(table, x, [part if need else None for part in parts])
        for parts, need in zip(layers.parameters, needs[3:6], strict=True)
    )
    shared: list[tuple[Tensor, Tensor]] = []
    alone = members_of(table, experts, count)
    for i in range(last, -1, -1) if need_experts else ():
        wanted = [part[i * count : (i + 1) * count] or [None] * count for part in (shifts, scales, slopes)]
        runs += _preactivations(level, table, shared, layers.each[i], (values[i], at_grads[i]), wanted)
        if i:
            operands = (at_grads[i], at_weights + i * count)
            runs.append(inputs_gradient(level, table, i, 0, operands, alone, (at_grads[i - 1], 0, None)))
    runs += [_shared_slopes(table, shared, layers)] if shared else []
    grad_inputs = [table.room(x, stream.shape) for stream in inputs if needs.inputs]
    if needs.inputs:
        readers = members_of(table, spec.expert_inputs, len(inputs))
        outputs = (table.pointers(grad_inputs), 0, None)
        runs.append(inputs_gradient(level, table, 0, 0, (at_grads[0], at_weights), readers, outputs))
    read = [table.pointers(inputs[stream] for stream in spec.expert_inputs), *at_hidden[:last]]
    grad_weights = table.together(x, [weight.shape for weight in weights if needs.weights])
    grad_biases = table.together(x, [weight.shape[:1] for weight in weights if needs.biases])
    if needs.weights or needs.biases:
        runs.append(parameters_gradient(level, table, at_grads, read, grad_weights, grad_biases))
    execute(table, x, runs)
    # A constant does not move what a batch norm gives; a NaN stays.
    table.unmoved = [grad for i, grad in enumerate(grad_biases) if spec.layers[i // count].norm == BATCH_NORM]
    if table.unmoved:
        torch._foreach_mul_(table.unmoved, 0.0)
    scales, shifts, slopes = (
        [None if grad is None else grad.to(part.dtype) for grad, part in zip(*pair, strict=True)]
        for pair in zip((scales, shifts, slopes), groups[3:6], strict=True)
    )
    return Groups(grad_inputs, grad_weights, grad_biases, scales, shifts, slopes, logits, [])


def _like(table: Table, x: Tensor, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Room for a gradient of each that there is."""
    present = [part for part in parts if part is not None]
    made = iter(table.together(x, [part.shape for part in present], present[0].dtype) if present else ())
    return [None if part is None else next(made) for part in parts]


def _preactivations(
    level: LevelShape,
    table: Table,
    shared: list[tuple[Tensor, Tensor]],
    layer: Layer,
    places: tuple[int, int],
    wanted: Sequence[Sequence[Tensor | None]],
) -> list[Run]:
    """From the gradient of what a layer gives, in its place, that of its pre-activations.

    ``places``: where pre-activations and gradients are. ``wanted``: where the gradients of the shifts, scales and
    slopes go, None for one that is not. To ``shared`` the totals of slopes that all channels share are added, and where
    their gradients go.
    """
    count, width = level.num_experts, level.widths[layer.number + 1]
    aligned = level.kind.aligned
    blocks = triton.cdiv(level.num_rows, tiles.SUMS[aligned].rows * tiles.SUMS[aligned].depth)
    sums = layer.spec.norm == BATCH_NORM or any(grad is not None for part in wanted for grad in part)
    parts, totals = (table.room(level.like, (n * sums, count, 3, width), torch.float32) for n in (blocks, 1))
    at_parts, at_totals = table.pointers([parts]), table.pointers([totals])
    shifts, scales, slopes = wanted
    one = [grad is not None and grad.numel() == 1 for grad in slopes]
    shared += ((totals[0, e, 2], grad) for e, grad in enumerate(slopes) if grad is not None and one[e])
    by_channel = [None if one[e] else grad for e, grad in enumerate(slopes)]
    at_wanted = table.pointers((*shifts, *scales, *by_channel))
    shape = (count, level.num_rows, width, *layer.numbers)
    constants = {"KIND": level.kind.without_products, "LAYER": layer.settings}
    rows = count * triton.cdiv(level.num_rows, tiles.VALUES[aligned].rows)

    def add(entries: Tensor) -> Launch | None:
        tile = tiles.SUMS[aligned]
        programs = count * blocks * triton.cdiv(width, tile.columns)
        return launch(norm_sums, programs, tile, entries, *places, layer.place, at_parts, *shape, **constants)

    def add_blocks(entries: Tensor) -> Launch | None:
        programs = count * triton.cdiv(width, tiles.TOTALS.columns)
        numbers = (at_parts, at_totals, at_wanted, count, blocks, width)
        own = {"SCALES": layer.settings.scales, "SUMS": 3 if has_slopes(layer.spec.activation) else 2}
        return launch(norm_totals, programs, tiles.TOTALS, entries, *numbers, **own)

    def of_columns(entries: Tensor) -> Launch | None:
        tile = tiles.VALUES[aligned]
        numbers = (*places, layer.place, at_totals, *shape)
        return launch(preactivation_gradient, blocks_of(level, tile, width), tile, entries, *numbers, **constants)

    def of_rows(entries: Tensor) -> Launch | None:
        return launch(
            layer_norm_gradient, rows, tiles.VALUES[aligned], entries, *places, layer.place, *shape, **constants
        )

    def dice_sums(entries: Tensor) -> Launch | None:
        return launch(
            dice_gradient_rows, rows, tiles.VALUES[aligned], entries, *places, layer.place, *shape, **constants
        )

    runs = [dice_sums] if layer.spec.activation == DICE else []
    return [*runs, *([add, add_blocks] if sums else []), of_rows if layer.spec.norm == LAYER_NORM else of_columns]


def _shared_slopes(table: Table, shared: Sequence[tuple[Tensor, Tensor]], layers: Layers) -> Run:
    """The gradients of slopes that all channels share: pairs of the totals of the channels and where the sum goes."""
    totals, grads = zip(*shared, strict=True)
    places = (table.pointers(totals), table.pointers(grads), table.integers(total.numel() for total in totals))

    def run(entries: Tensor) -> Launch | None:
        return launch(slope_totals, len(totals), tiles.SLOPES, entries, *places, SCALES=DTYPES[layers.dtype])

    return run
