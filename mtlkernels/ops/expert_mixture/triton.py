"""Expert mixture on NVIDIA GPUs.

Forward one launch a layer, where the last one mixes as well (or one more launch does). Backward one launch for the
mixture, one a layer for the gradient of its inputs, and one for all weights and biases.
Parameters, inputs and gradients are read and written where they are; only hidden layers, [E, B, H] each, are scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._triton import DTYPES, Table, Tile, contiguous, launch
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.expert_mixture import triton_tiles as tiles
from mtlkernels.ops.expert_mixture.triton_kernels import input_gradient, last_forward, layer_forward, weight_gradient
from mtlkernels.ops.gated_mixture import triton as mixture


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
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference: K outputs [B, H_L] and, with ``save``, one [E, B, H] tensor a layer for :func:`backward`."""
    inputs, weights = contiguous(inputs), contiguous(weights)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    x, num_experts, last = inputs[0], len(expert_inputs), len(activations) - 1
    num_rows = x.shape[0]
    widths = [weights[layer * num_experts].shape[0] for layer in range(last + 1)]
    saved = [x.new_empty((num_experts, num_rows, width)) for width in widths] if save else []
    aligned = _triton.aligned((*inputs, *weights), (x.shape[1], *widths))
    constants = _constants(x, aligned)
    choice = (tiles.operands(x.dtype, constants["PRECISION"]), aligned)
    fused = tiles.fuses(*choice, len(gate_sizes), num_rows, widths[-1])
    hidden = _hidden(x, num_experts, widths, activations, saved, fused)

    table = Table()
    read = [table.pointers(inputs[stream] for stream in expert_inputs)]
    read += [table.slices(tensor, num_experts) for tensor in hidden]
    at_weights = table.pointers(weights)
    at_biases = table.integers(0 if bias is None else bias.data_ptr() for bias in biases)
    kept = [table.slices(tensor, num_experts) for tensor in saved] if save else [0] * (last + 1)
    gates = (gate_logits, gate_experts, gate_sizes)
    if fused:
        outputs = [x.new_empty((num_rows, widths[-1])) for _ in gate_sizes]
        at_outputs = table.pointers(outputs)
        at_gates = _triton.gate_entries(table, *gates)
        positions = table.integers(_positions(gate_experts, gate_sizes, num_experts))
    else:
        at = mixture.strides(table, hidden[-1], 1, 0)
        outputs, mix = mixture.prepare_forward(table, aligned, at, x, (num_rows, widths[-1]), *gates)
    with _triton.on_device(x.device):
        entries = table.to(x.device)
        for layer, code in enumerate(activations):
            width, depth = widths[layer], (x.shape[1], *widths)[layer]
            operands = (read[layer], at_weights + layer * num_experts, at_biases + layer * num_experts)
            sizes = (num_experts, num_rows, width, depth)
            if layer == last and fused:
                tile = tiles.MIXING[choice]
                launch(
                    last_forward,
                    triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns),
                    tile,
                    entries,
                    *operands,
                    at_outputs,
                    kept[layer],
                    at_gates,
                    positions,
                    *sizes,
                    **constants,
                    LOGITS=DTYPES[gate_logits[0].dtype],
                    CODE=code,
                    FROM_INPUT=from_input(code),
                    KEEP=save,
                    GATES=len(gate_sizes),
                )
            else:
                tile = tiles.product(*choice, num_rows, width)
                launch(
                    layer_forward,
                    num_experts * triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns),
                    tile,
                    entries,
                    *operands,
                    read[layer + 1],
                    kept[layer],
                    *sizes,
                    **constants,
                    CODE=code,
                    KEEP=save and from_input(code),
                )
        if not fused:
            mix(entries)
    return outputs, saved


def _hidden(
    like: Tensor,
    num_experts: int,
    widths: Sequence[int],
    activations: Sequence[int],
    saved: Sequence[Tensor],
    fused: bool,
) -> list[Tensor | None]:
    """Where each layer's activations go: what is saved, if that is them, or scratch. None for a fused last layer.

    Layers that are not saved alternate between two buffers.
    """
    buffers: dict[int, Tensor] = {}
    hidden: list[Tensor | None] = []
    for layer, width in enumerate(widths):
        if layer == len(widths) - 1 and fused:
            hidden.append(None)
        elif saved and not from_input(activations[layer]):
            hidden.append(saved[layer])
        else:
            size = num_experts * like.shape[0]
            parity = layer % 2
            if parity not in buffers:
                buffers[parity] = like.new_empty(size * max(widths[parity::2]))
            hidden.append(buffers[parity][: size * width].view(num_experts, like.shape[0], width))
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


def _constants(x: Tensor, aligned: bool) -> dict[str, Any]:
    return {
        "DTYPE": DTYPES[x.dtype],
        "ALIGNED": aligned,
        "PRECISION": _triton.precision(x.dtype),
        "UPCAST": _triton.upcast(),
    }


def backward(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    saved: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """As the reference: gradients of the inputs, weights, biases (one a weight) and logits."""
    inputs, weights, saved = contiguous(inputs), contiguous(weights), contiguous(saved)
    grad_outputs = contiguous(grad_outputs)
    x, num_experts, last = inputs[0], len(expert_inputs), len(activations) - 1
    widths = [tensor.shape[2] for tensor in saved]
    aligned = _triton.aligned((*inputs, *weights, *saved, *grad_outputs), (x.shape[1], *widths))
    constants = _constants(x, aligned)
    choice = (tiles.operands(x.dtype, constants["PRECISION"]), aligned)
    need_parameters = need_weights or need_biases
    need_experts = need_inputs or need_parameters
    # d of a layer's pre-activation; the layers below the last one only where something there wants it.
    grads = [torch.empty_like(tensor) for tensor in saved] if need_experts else []

    table = Table()
    at_saved = [table.slices(tensor, num_experts) for tensor in saved]
    at_grads = [table.slices(tensor, num_experts) for tensor in grads]
    at_weights = table.pointers(weights)
    grad_logits, run_mixture = mixture.prepare_backward(
        table,
        aligned,
        mixture.strides(table, saved[-1], 1, 0),
        mixture.strides(table, grads[-1] if grads else None, 1, 0),
        num_experts,
        activations[-1],
        grad_outputs,
        gate_logits,
        gate_experts,
        gate_sizes,
        need_experts,
        need_logits,
    )
    # What each layer reads: the inputs, or the activations below, computed again where their input was saved.
    below: list[Tensor | None] = [None]
    for layer in range(last):
        again = need_weights and from_input(activations[layer])
        below.append(torch.empty_like(saved[layer]) if again else None)
    at_below = [table.slices(tensor, num_experts) for tensor in below]
    read = [at_below[layer] if below[layer] is not None else at_saved[layer - 1] for layer in range(last + 1)]
    read[0] = table.pointers(inputs[stream] for stream in expert_inputs)
    grad_inputs = [x.new_empty(stream.shape) for stream in inputs] if need_inputs else []
    grad_weights = [x.new_empty(weight.shape) for weight in weights] if need_weights else []
    grad_biases = [x.new_empty(weight.shape[0]) for weight in weights] if need_biases else []
    at_grad_inputs = table.pointers(grad_inputs)
    at_grad_weights, at_grad_biases = table.pointers(grad_weights), table.pointers(grad_biases)
    alone = table.integers(range(num_experts + 1))  # every expert a group of its own: offsets, then experts
    table.integers(range(num_experts))
    readers = table.integers(_readers(expert_inputs, len(inputs)))
    parameter_tile = tiles.WEIGHT_GRADIENT[choice]
    layers, programs = _parameter_entries(
        parameter_tile,
        num_experts,
        need_weights,
        [(widths[layer], (x.shape[1], *widths)[layer]) for layer in range(last + 1)],
        [
            (at_grads[layer], read[layer], at_grad_weights + layer * num_experts, at_grad_biases + layer * num_experts)
            for layer in range(last + 1)
            if need_parameters
        ],
    )
    at_layers = table.integers(layers)

    with _triton.on_device(x.device):
        entries = table.to(x.device)
        if need_experts or need_logits:
            run_mixture(entries)
        for layer in reversed(range(last + 1)):
            width, depth = (x.shape[1], *widths)[layer], widths[layer]
            code = activations[layer - 1] if layer else 0
            if not (need_experts if layer else need_inputs):
                continue
            groups = num_experts if layer else len(inputs)
            tile = tiles.product(*choice, x.shape[0], width, heavy=from_input(code))
            launch(
                input_gradient,
                groups * triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(width, tile.columns),
                tile,
                entries,
                at_grads[layer],
                at_weights + layer * num_experts,
                alone if layer else readers,
                at_grads[layer - 1] if layer else at_grad_inputs,
                at_saved[layer - 1] if layer else 0,
                at_below[layer],
                groups,
                x.shape[0],
                width,
                depth,
                **constants,
                CODE=code,
                ACTIVATED=below[layer] is not None,
            )
        launch(
            weight_gradient,
            programs,
            parameter_tile,
            entries,
            at_layers,
            last + 1,
            num_experts,
            x.shape[0],
            **constants,
            NEED_WEIGHTS=need_weights,
            NEED_BIASES=need_biases,
        )
    return grad_inputs, grad_weights, grad_biases, grad_logits


def _readers(expert_inputs: Sequence[int], num_inputs: int) -> list[int]:
    """For each stream an offset, and one more, then the experts that read the streams, stream by stream."""
    offsets = [0] * (num_inputs + 1)
    for stream in expert_inputs:
        offsets[stream + 1] += 1
    for stream in range(num_inputs):
        offsets[stream + 1] += offsets[stream]
    return offsets + sorted(range(len(expert_inputs)), key=lambda e: expert_inputs[e])


def _parameter_entries(
    tile: Tile,
    num_experts: int,
    need_weights: bool,
    shapes: Sequence[tuple[int, int]],
    places: Sequence[tuple[int, int, int, int]],
) -> tuple[list[int], int]:
    """What ``weight_gradient`` knows of the layers, and its number of programs, 0 where there are no ``places``."""
    entries: list[int] = []
    programs = 0
    for shape, place in zip(shapes, places, strict=False):
        entries += [programs, *shape, *place]
        blocks = triton.cdiv(shape[1], tile.columns) if need_weights else 1
        programs += num_experts * triton.cdiv(shape[0], tile.rows) * blocks
    return entries, programs
