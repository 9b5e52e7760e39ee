"""The forward pass of the expert mixture on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._triton import DTYPES, Table, Tile, contiguous, launch
from mtlkernels.ops._triton_splits import split
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.expert_mixture import triton_tiles as tiles
from mtlkernels.ops.expert_mixture.triton_gates import VECTOR, GateLayers
from mtlkernels.ops.expert_mixture.triton_kernels import last_forward, layer_forward
from mtlkernels.ops.expert_mixture.triton_level import Level, Run, execute
from mtlkernels.ops.gated_mixture import triton as mixture

Gates = tuple[Sequence[Tensor], Sequence[int], Sequence[int]]


def forward(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    save: bool,
    layers: GateLayers | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference: K outputs [B, H_L] and, with ``save``, one [E, B, H] tensor a layer for :func:`backward`.

    With ``layers`` the logits are computed first, beside the experts' first layer unless that mixes as well.
    """
    inputs, weights = contiguous(inputs), contiguous(weights)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    x, num_experts, last = inputs[0], len(expert_inputs), len(activations) - 1
    widths = [weights[layer * num_experts].shape[0] for layer in range(last + 1)]
    level = Level.of(x, num_experts, widths, (*inputs, *weights, *(layers.weights if layers else ())))
    saved = [x.new_empty((num_experts, x.shape[0], width)) for width in widths] if save else []
    tile = tiles.mixing(*level.kind, len(gate_sizes), x.shape[0])
    hidden = _hidden(level, activations, saved, fused=tile is not None)

    table = Table()
    read = [table.pointers(inputs[stream] for stream in expert_inputs)]
    read += [table.slices(tensor, num_experts) for tensor in hidden]
    at_weights, at_biases = table.pointers(weights), table.pointers(biases)
    kept = [table.slices(tensor, num_experts) for tensor in saved] if save else [0] * (last + 1)
    # Of each layer: where its inputs, weights, biases, outputs and what it keeps are.
    places = [
        (read[layer], at_weights + layer * num_experts, at_biases + layer * num_experts, read[layer + 1], kept[layer])
        for layer in range(last + 1)
    ]
    gates = (gate_logits, gate_experts, gate_sizes)
    linear = layers.entries(table) if layers else None
    runs = []
    if linear and last == 0 and tile is not None:
        alone = replace(level, num_experts=0, widths=(level.widths[0], VECTOR))
        runs.append(_layer(alone, 0, 0, places[0], False, linear))
        linear = None
    for layer in range(last if tile is not None else last + 1):
        runs.append(_layer(level, layer, activations[layer], places[layer], save, None if layer else linear))
    if tile is None:
        at = mixture.strides(table, hidden[-1], 1, 0)
        outputs, run = mixture.prepare_forward(table, level.aligned, at, x, (x.shape[0], widths[-1]), *gates)
    else:
        outputs, run = _last(level, table, tile, activations[last], places[last], gates, save)
    execute(table, x, [*runs, run])
    return outputs, saved


def _layer(
    level: Level, layer: int, code: int, places: tuple[int, ...], save: bool, gates: tuple[int, int] | None = None
) -> Run:
    """One layer of every expert; with ``gates``, see :meth:`GateLayers.entries`, their logits too."""
    depth, width = level.widths[layer : layer + 2]
    tile = tiles.product(*level.kind, level.num_rows, width)
    if gates:
        tile = tiles.beside_gates(tile)
    at_gates, gate_tiles = gates or (0, 0)
    programs = level.num_experts * triton.cdiv(width, tile.columns) + gate_tiles

    def run(entries: Tensor) -> None:
        sizes = (level.num_experts, level.num_rows, width, depth)
        keep = save and from_input(code)
        launch(
            layer_forward,
            triton.cdiv(level.num_rows, tile.rows) * programs,
            tile,
            entries,
            *places,
            at_gates,
            gate_tiles,
            *sizes,
            **level.constants,
            CODE=code,
            KEEP=keep,
            GATE_LAYERS=gates is not None,
        )

    return run


def _last(
    level: Level, table: Table, tile: Tile, code: int, places: tuple[int, ...], gates: Gates, save: bool
) -> tuple[list[Tensor], Run]:
    """The last layer and the mixture: the outputs, and what fills them."""
    gate_logits, gate_experts, gate_sizes = gates
    depth, width = level.widths[-2:]
    outputs = [level.like.new_empty((level.num_rows, width)) for _ in gate_sizes]
    at_outputs = table.pointers(outputs)
    at_gates = _triton.gate_entries(table, gate_logits, gate_experts, gate_sizes)
    positions = table.integers(_positions(gate_experts, gate_sizes, level.num_experts))
    sizes = (level.num_experts, level.num_rows, width, depth)
    sums = tiles.mixing_sums(tile, *sizes, len(gate_sizes), level.like.itemsize)
    shares = split(table, sums, level.like)
    *operands, _, kept = places

    def run(entries: Tensor) -> None:
        launch(
            last_forward,
            shares.programs,
            tile,
            entries,
            *operands,
            at_outputs,
            kept,
            at_gates,
            positions,
            *shares.arguments,
            *sizes,
            **level.constants,
            LOGITS=DTYPES[gate_logits[0].dtype],
            CODE=code,
            FROM_INPUT=from_input(code),
            KEEP=save,
            GATES=len(gate_sizes),
            SPLIT=shares.count > 1,
        )

    return outputs, run


def _hidden(level: Level, activations: Sequence[int], saved: Sequence[Tensor], fused: bool) -> list[Tensor | None]:
    """Where each layer's activations go: what is saved, if that is them, or scratch. None for a fused last layer.

    Layers that are not saved alternate between two buffers.
    """
    widths, size = level.widths[1:], level.num_experts * level.num_rows
    buffers: dict[int, Tensor] = {}
    hidden: list[Tensor | None] = []
    for layer, width in enumerate(widths):
        if layer == len(widths) - 1 and fused:
            hidden.append(None)
        elif saved and not from_input(activations[layer]):
            hidden.append(saved[layer])
        else:
            parity = layer % 2
            if parity not in buffers:
                buffers[parity] = level.like.new_empty(size * max(widths[parity::2]))
            hidden.append(buffers[parity][: size * width].view(level.num_experts, level.num_rows, width))
    return hidden


def _positions(gate_experts: Sequence[int], gate_sizes: Sequence[int], num_experts: int) -> list[int]:
    """[K, E], flat: each expert's place among a gate's logits, or -1."""
    positions = [-1] * (len(gate_sizes) * num_experts)
    start = 0
    for k, size in enumerate(gate_sizes):
        for place, expert in enumerate(gate_experts[start : start + size]):
            positions[k * num_experts + expert] = place
        start += size
    return positions
