"""The forward pass of a chain on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
import triton
from torch import Tensor

from mtlkernels.ops._triton import DTYPES, Launch, Run, Table, Tile, contiguous, launch
from mtlkernels.ops._triton_functions import FEW_MEMBERS
from mtlkernels.ops._triton_splits import card, split
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.gated_mixture.triton import Gates
from mtlkernels.ops.level.spec import Groups, LevelSpec
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.chain_kernels import INPUTS, SIGNS, last_forward, layer_forward
from mtlkernels.ops.level.triton.launches import LevelShape, execute
from mtlkernels.ops.level.triton.linear_gates import VECTOR, LinearGates


def forward(table: Table, spec: LevelSpec, groups: Groups, save: bool) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference, where no layer stores pre-activations: K outputs [B, H_L], and what is saved.

    The logits of linear gates are computed first, beside the experts' first layer unless that mixes as well. ``table``
    is the call's, which is empty.
    """
    inputs, weights, biases = map(contiguous, groups[:3])
    x, experts, last = inputs[0], range(len(spec.expert_inputs)), len(spec.layers) - 1
    widths = [weight.shape[0] for weight in weights[:: len(experts)]]
    linear, logits = None, list(groups.gates)
    shapes: list[tuple[int, ...]] = [(len(experts), x.shape[0], width) for width in widths] if save else []
    if spec.gate_inputs:
        linear = LinearGates(inputs, spec.gate_inputs, contiguous(groups.gates), contiguous(groups.gate_biases))
        shapes.append((x.shape[0], sum(spec.gate_sizes)))
    level = LevelShape.of(x, len(experts), widths, (*inputs, *weights, *(linear.weights if linear else ())))
    rooms = table.together(x, shapes)  # as they are let go of
    saved = rooms[: last + 1] if save else []
    words = spec.sign_words(widths) if save else []
    signs = [table.room(x, (len(experts), x.shape[0], count), torch.int32) for count in words]
    if linear:
        logits = list(rooms[-1].split(spec.gate_sizes, 1))
    sizes = (len(spec.gate_sizes), len(experts), level.num_rows, widths[-1], level.widths[-2])
    tile = tiles.mixing(level.kind, *sizes, spec.layers[last].activation, save, card(x.device))
    gate_experts = iter(spec.gate_experts)
    if any(len(set(islice(gate_experts, size))) < size for size in spec.gate_sizes):
        tile = None  # an expert has one place in each gate there
    hidden = _hidden(table, level, spec, saved, fused=tile is not None)

    read = [table.pointers(inputs[stream] for stream in spec.expert_inputs)]
    read += [table.slices(tensor, experts) for tensor in hidden]
    at_weights, at_biases = table.pointers(weights), table.pointers(biases)
    also = dict(zip(spec.hidden_signs, signs, strict=False))
    kept = [table.slices(also.get(i, tensor), experts) for i, tensor in enumerate(saved)] if save else [0] * (last + 1)
    # Of each layer: where its inputs, weights, biases, outputs and what it keeps are.
    places = [
        (read[layer], at_weights + layer * len(experts), at_biases + layer * len(experts), read[layer + 1], kept[layer])
        for layer in range(last + 1)
    ]
    gates = Gates(logits, spec.gate_experts, spec.gate_sizes)
    beside = linear.entries(table, rooms[-1]) if linear else None
    runs = []
    if beside and last == 0 and tile is not None:
        alone = replace(level, num_experts=0, widths=(level.widths[0], VECTOR))
        runs.append(_layer(alone, 0, 0, places[0], None, beside))
    for layer in range(last if tile is not None else last + 1):
        code = spec.layers[layer].activation
        keep = SIGNS.value if layer in also else INPUTS.value if save and from_input(code) else None
        runs.append(_layer(level, layer, code, places[layer], keep, None if layer else beside))
    if tile is None:
        at, shape = mixture.strides(table, hidden[-1], 1, 0), (level.num_rows, widths[-1])
        outputs, run = mixture.prepare_forward(table, level.kind, at, x, shape, gates)
    else:
        outputs, run = _last(level, table, tile, spec.layers[last].activation, places[last], gates, save)
    execute(table, x, [*runs, run])
    return outputs, [*saved, *signs, *rooms[last + 1 :]] if save else []


def _layer(
    level: LevelShape,
    layer: int,
    code: int,
    places: tuple[int, ...],
    keep: str | None,
    gates: tuple[int, int] | None,
) -> Run:
    """One layer of every expert; with ``gates``, see :meth:`LinearGates.entries`, their logits too.

    ``keep``: what is written beside its outputs, see ``layer_forward``.
    """
    depth, width = level.widths[layer : layer + 2]
    tile = tiles.product(level.kind, level.num_rows, width)
    if gates or keep == SIGNS.value:
        tile = tiles.roomy(tile)
    at_gates, gate_tiles = gates or (0, 0)
    programs = triton.cdiv(level.num_rows, tile.rows) * (
        level.num_experts * triton.cdiv(width, tile.columns) + gate_tiles
    )
    sizes = (level.num_experts, level.num_rows, width, depth)
    constants = {"CODE": code, "KEEP": keep, "LINEAR_GATES": gates is not None}

    def run(entries: Tensor) -> Launch | None:
        numbers = (*places, at_gates, gate_tiles, *sizes)
        return launch(layer_forward, programs, tile, entries, *numbers, KIND=level.kind, **constants)

    return run


def _last(
    level: LevelShape, table: Table, tile: Tile, code: int, places: tuple[int, ...], gates: Gates, save: bool
) -> tuple[list[Tensor], Run]:
    """The last layer and the mixture: the outputs, and what fills them."""
    depth, width = level.widths[-2:]
    outputs = [table.room(level.like, (level.num_rows, width)) for _ in gates.sizes]
    *operands, _, kept = places
    at = (*operands, table.pointers(outputs), kept, gates.entries(table), _positions(table, gates, level.num_experts))
    sizes = (level.num_experts, level.num_rows, width, depth)
    shares = split(table, tiles.mixing_sums(tile, *sizes, len(gates.sizes), level.like.itemsize), level.like)
    constants = {
        "KIND": level.kind,
        "LOGITS": DTYPES[gates.logits[0].dtype],
        "CODE": code,
        "KEEP": save,
        "GATES": len(gates.sizes),
        "SPLIT": shares.count > 1,
        "FEW": max(gates.sizes) <= FEW_MEMBERS.value,
        "AHEAD": tile in tiles.AHEAD_MIXING.values(),
    }

    def run(entries: Tensor) -> Launch | None:
        return launch(last_forward, shares.programs, tile, entries, *at, *shares.arguments, *sizes, **constants)

    return outputs, run


def _hidden(
    table: Table, level: LevelShape, spec: LevelSpec, saved: Sequence[Tensor], fused: bool
) -> list[Tensor | None]:
    """Where each layer's activations go: what is saved, if that is them, or scratch. None for a fused last layer.

    Layers that are not saved alternate between two buffers.
    """
    widths, size = level.widths[1:], level.num_experts * level.num_rows
    buffers: dict[int, Tensor] = {}
    hidden: list[Tensor | None] = []
    for layer, width in enumerate(widths):
        if layer == len(widths) - 1 and fused:
            hidden.append(None)
        elif saved and not from_input(spec.layers[layer].activation):
            hidden.append(saved[layer])
        else:
            parity = layer % 2
            if parity not in buffers:
                buffers[parity] = table.room(level.like, (size * max(widths[parity::2]),))
            hidden.append(buffers[parity][: size * width].view(level.num_experts, level.num_rows, width))
    return hidden


def _positions(table: Table, gates: Gates, num_experts: int) -> int:
    """Appends [K, E], flat: each expert's place among a gate's logits, or -1."""
    positions = [-1] * (len(gates.sizes) * num_experts)
    start = 0
    for k, size in enumerate(gates.sizes):
        for place, expert in enumerate(gates.experts[start : start + size]):
            positions[k * num_experts + expert] = place
        start += size
    return table.integers(positions)
