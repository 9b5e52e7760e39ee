"""The backward pass of the expert mixture on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlkernels.ops._triton import Table, contiguous, launch
from mtlkernels.ops._triton_splits import split
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.expert_mixture import triton_tiles as tiles
from mtlkernels.ops.expert_mixture.triton_gates import GateGradients
from mtlkernels.ops.expert_mixture.triton_gradients import input_gradient, weight_gradient
from mtlkernels.ops.expert_mixture.triton_level import Level, Parameters, Run, execute
from mtlkernels.ops.gated_mixture import triton as mixture

# Groups of experts: a place in the table, and the number of members of each.
Groups = tuple[int, list[int]]


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
    gates: GateGradients | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """As the reference: gradients of the inputs, weights, biases (one a weight) and logits.

    With ``gates`` the logits' go there, as do those of the gates' weights and biases, and the inputs' include theirs.
    """
    inputs, weights, saved = contiguous(inputs), contiguous(weights), contiguous(saved)
    grad_outputs = contiguous(grad_outputs)
    x, num_experts, last = inputs[0], len(expert_inputs), len(activations) - 1
    widths = [tensor.shape[2] for tensor in saved]
    read_whole = (*inputs, *weights, *saved, *grad_outputs, *(gates.layers.weights if gates else ()))
    level = Level.of(x, num_experts, widths, read_whole)
    need_experts = need_inputs or need_weights or need_biases
    # d of each layer's pre-activation.
    grads = [torch.empty_like(tensor) for tensor in saved] if need_experts else []
    # What the layers above the first read: the activations below, computed again where their input was saved.
    below = [torch.empty_like(saved[i]) if need_weights and from_input(activations[i]) else None for i in range(last)]

    table = Table()
    at_saved = [table.slices(tensor, num_experts) for tensor in saved]
    at_grads = [table.slices(tensor, num_experts) for tensor in grads]
    at_below = [table.slices(tensor, num_experts) for tensor in below]
    at_weights = table.pointers(weights)
    grad_logits, run_mixture = mixture.prepare_backward(
        table,
        level.aligned,
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
        gates.each() if gates else None,
    )
    runs = [run_mixture] if need_experts or need_logits else []
    grad_inputs = [x.new_empty(stream.shape) for stream in inputs] if need_inputs else []
    alone = groups_of(table, range(num_experts), num_experts)
    for layer in range(last, 0, -1) if need_experts else ():
        operands = (at_grads[layer], at_weights + layer * num_experts)
        again = at_below[layer - 1] if below[layer - 1] is not None else None
        outputs = (at_grads[layer - 1], at_saved[layer - 1], again)
        runs.append(inputs_gradient(level, table, layer, activations[layer - 1], operands, alone, outputs))
    if need_inputs:
        groups = groups_of(table, expert_inputs, len(inputs))
        outputs = (table.pointers(grad_inputs), 0, None)
        more = gates.members(table) if gates else None
        runs.append(inputs_gradient(level, table, 0, 0, (at_grads[0], at_weights), groups, outputs, more))
    read = [table.pointers(inputs[stream] for stream in expert_inputs)]
    read += [at_saved[i] if below[i] is None else at_below[i] for i in range(last)]
    grad_weights = [x.new_empty(weight.shape) for weight in weights] if need_weights else []
    grad_biases = [x.new_empty(weight.shape[0]) for weight in weights] if need_biases else []
    of_gates = gates.parameters(table) if gates and (gates.weights or gates.biases) else []
    if gates and of_gates and (bool(gates.weights), bool(gates.biases)) != (need_weights, need_biases):
        runs.append(_parameters_gradient(level, table, [], of_gates, bool(gates.weights), bool(gates.biases)))
        of_gates = []
    if need_weights or need_biases:
        runs.append(parameters_gradient(level, table, at_grads, read, grad_weights, grad_biases, of_gates))
    execute(table, x, runs)
    return grad_inputs, grad_weights, grad_biases, grad_logits


def groups_of(table: Table, owners: Sequence[int], count: int) -> Groups:
    """Appends, for each group, an offset, and one more, then the experts of all groups; ``owners`` has theirs."""
    sizes = [0] * count
    for owner in owners:
        sizes[owner] += 1
    start = table.integers(sum(sizes[:i]) for i in range(count + 1))
    table.integers(sorted(range(len(owners)), key=lambda e: owners[e]))
    return start, sizes


def inputs_gradient(
    level: Level,
    table: Table,
    layer: int,
    code: int,
    operands: tuple[int, int],
    groups: Groups,
    outputs: tuple[int, int, int | None],
    gates: int | None = None,
) -> Run:
    """The gradient of a layer's inputs. ``code`` is the activation in front of it, or 0.

    ``operands``: where the gradients behind the layer, and its weights, are. ``outputs``: where it goes, where what the
    forward pass saved of the layer below is, and where its activation goes, if that is wanted. ``gates``: where linear
    gates of the inputs are, see :meth:`GateGradients.members`.
    """
    members, sizes = groups
    width, depth = level.widths[layer : layer + 2]
    tile = tiles.product(*level.kind, level.num_rows, width, heavy=from_input(code))
    sums = tiles.input_sums(tile, sizes, level.num_rows, width, depth, level.like.itemsize)
    shares = split(table, sums, level.like)
    at, kept, activated = outputs

    def run(entries: Tensor) -> None:
        launch(
            input_gradient,
            shares.programs,
            tile,
            entries,
            *operands,
            members,
            at,
            kept,
            activated or 0,
            gates or 0,
            *shares.arguments,
            len(sizes),
            level.num_rows,
            width,
            depth,
            **level.constants,
            CODE=code,
            ACTIVATED=activated is not None,
            GATE_LAYERS=gates is not None,
            SPLIT=shares.count > 1,
        )

    return run


def parameters_gradient(
    level: Level,
    table: Table,
    grads: Sequence[int],
    read: Sequence[int],
    grad_weights: Sequence[Tensor],
    grad_biases: Sequence[Tensor],
    gates: Sequence[Parameters] = (),
) -> Run:
    """The gradients of all weights and biases, whichever there are. ``read``: where the inputs of each layer are.

    ``gates``: those of linear gates, of which the same are wanted.
    """
    at_weights, at_biases = table.pointers(grad_weights), table.pointers(grad_biases)
    layers = []
    for layer in range(level.num_layers):
        first, width, height = layer * level.num_experts, *level.widths[layer : layer + 2]
        places = (grads[layer], read[layer], at_weights + first, at_biases + first)
        layers.append(Parameters(level.num_experts, height, width, *places))
    return _parameters_gradient(level, table, layers, gates, bool(grad_weights), bool(grad_biases))


def _parameters_gradient(
    level: Level,
    table: Table,
    experts: Sequence[Parameters],
    gates: Sequence[Parameters],
    need_weights: bool,
    need_biases: bool,
) -> Run:
    """The gradients of the weights and biases of experts' layers, of linear gates, or of both."""
    tile = tiles.WEIGHT_GRADIENT[level.kind]
    layers: list[int] = []
    blocks = 0
    for part in (*experts, *gates):
        layers += [blocks, *part]
        blocks += tiles.weight_blocks(tile, part.members, part.height, part.width if need_weights else 1)
    at_layers = table.integers(layers)
    shares = split(table, tiles.weight_sums(tile, blocks, level.num_rows, level.like.itemsize), level.like)

    def run(entries: Tensor) -> None:
        launch(
            weight_gradient,
            shares.programs,
            tile,
            entries,
            at_layers,
            *shares.arguments,
            len(experts) + len(gates),
            len(experts),
            level.num_rows,
            **level.constants,
            NEED_WEIGHTS=need_weights,
            NEED_BIASES=need_biases,
            GATE_LAYERS=len(gates) > 0,
            SPLIT=shares.count > 1,
        )

    return run
