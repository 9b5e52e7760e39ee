"""The backward pass of a chain on NVIDIA GPUs, and what it has in common with that of a layerwise level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtlkernels.ops._triton import Launch, Run, Table, Tile, contiguous, launch
from mtlkernels.ops._triton_splits import card, split
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.gated_mixture.triton import Gates
from mtlkernels.ops.level.spec import Groups, LevelSpec
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.gradient_kernels import input_gradient, weight_gradient, wide_input_gradient
from mtlkernels.ops.level.triton.launches import LevelShape, Parameters, execute
from mtlkernels.ops.level.triton.linear_gates import GateGradients, LinearGates

# Groups of experts: a place in the table, and the number of members of each.
Members = tuple[int, list[int]]


def backward(
    table: Table,
    spec: LevelSpec,
    grad_outputs: Sequence[Tensor],
    groups: Groups,
    saved: Sequence[Tensor],
    signs: Sequence[Tensor],
    logits: Sequence[Tensor],
    needs: Groups,
) -> Groups:
    """The gradients of a level, which may be part of the one of which the forward pass ``saved`` something.

    ``table`` is the call's, which is empty; ``signs`` are of ``spec.hidden_signs``, ``logits`` those of linear gates.
    Of each kind that ``needs`` asks for there are all gradients, of others none.
    """
    inputs, weights, saved, grad_outputs = map(contiguous, (groups.inputs, groups.weights, saved, grad_outputs))
    x, codes, last = inputs[0], [layer.activation for layer in spec.layers], len(spec.layers) - 1
    linear = GateGradients(
        table, LinearGates(inputs, spec.gate_inputs, contiguous(groups.gates)), needs.gates, needs.gate_biases
    ) if spec.gate_inputs else None  # fmt: skip
    read_whole = (*inputs, *weights, *saved, *grad_outputs, *(linear.gates.weights if linear else ()))
    level = LevelShape.of(x, len(spec.expert_inputs), [tensor.shape[2] for tensor in saved], read_whole)
    need_experts = needs.inputs or needs.weights or needs.biases
    need_logits = needs.gates or (linear is not None and (needs.inputs or needs.gate_biases))
    # d of each layer's pre-activation.
    grads = [level.outputs(table, layer) for layer in range(last + 1)] if need_experts else []
    # What the layers above the first read: the activations below, computed again where their input was saved.
    below = [level.outputs(table, i) if needs.weights and from_input(codes[i]) else None for i in range(last)]

    experts = range(level.num_experts)
    at_saved = [table.slices(tensor, spec.numbers) for tensor in saved]
    at_signs = {i: table.slices(own, spec.numbers) for i, own in zip(spec.hidden_signs, contiguous(signs), strict=True)}
    at_grads = [table.slices(tensor, experts) for tensor in grads]
    at_below = [table.slices(tensor, experts) for tensor in below]
    at_weights = table.pointers(weights)
    of_logits = linear.logits() if linear else [table.room(x, t.shape, t.dtype) for t in groups.gates]
    features = mixture.strides(table, saved[-1], 1, 0), mixture.strides(table, grads[-1] if grads else None, 1, 0)
    gates = Gates(logits or groups.gates, spec.gate_experts, spec.gate_sizes)
    run_mixture = mixture.prepare_backward(
        table,
        level.kind,
        features,
        [number * saved[-1].stride(0) for number in spec.numbers],
        codes[-1],
        grad_outputs,
        gates,
        need_experts,
        of_logits if need_logits else [],
    )
    runs = [run_mixture]
    alone = members_of(table, experts, len(experts))
    for layer in range(last, 0, -1) if need_experts else ():
        operands = (at_grads[layer], at_weights + layer * len(experts))
        again = at_below[layer - 1] if below[layer - 1] is not None else None
        outputs = (at_grads[layer - 1], at_signs.get(layer - 1, at_saved[layer - 1]), again)
        runs.append(inputs_gradient(level, table, layer, codes[layer - 1], operands, alone, outputs))
    grad_inputs = [table.room(x, stream.shape) for stream in inputs if needs.inputs]
    if needs.inputs:
        readers = members_of(table, spec.expert_inputs, len(inputs))
        outputs = (table.pointers(grad_inputs), 0, None)
        more = linear.members(table) if linear else None
        runs.append(inputs_gradient(level, table, 0, 0, (at_grads[0], at_weights), readers, outputs, more))
    read = [table.pointers(inputs[stream] for stream in spec.expert_inputs)]
    read += [at_saved[i] if below[i] is None else at_below[i] for i in range(last)]
    grad_weights = table.together(x, [weight.shape for weight in weights if needs.weights])
    grad_biases = table.together(x, [weight.shape[:1] for weight in weights if needs.biases])
    of_gates = linear.parameters(table) if linear and (needs.gates or needs.gate_biases) else []
    if of_gates and (needs.gates, needs.gate_biases) != (needs.weights, needs.biases):
        runs.append(_parameters_gradient(level, table, [], of_gates, needs.gates, needs.gate_biases))
        of_gates = []
    if needs.weights or needs.biases:
        runs.append(parameters_gradient(level, table, at_grads, read, grad_weights, grad_biases, of_gates))
    execute(table, x, runs)
    grad_gates, grad_offsets = (linear.weights, linear.biases) if linear else (of_logits if need_logits else [], [])
    return Groups(grad_inputs, grad_weights, grad_biases, [], [], [], grad_gates, grad_offsets)


def members_of(table: Table, owners: Sequence[int], count: int) -> Members:
    """Appends, for each group, an offset, and one more, then the experts of all groups; ``owners`` has theirs."""
    sizes = [0] * count
    for owner in owners:
        sizes[owner] += 1
    start = table.integers(sum(sizes[:i]) for i in range(count + 1))
    table.integers(sorted(range(len(owners)), key=lambda e: owners[e]))
    return start, sizes


def inputs_gradient(
    level: LevelShape,
    table: Table,
    layer: int,
    code: int,
    operands: tuple[int, int],
    members: Members,
    outputs: tuple[int, int, int | None],
    gates: int | None = None,
) -> Run:
    """The gradient of a layer's inputs. ``code`` is the activation in front of it, or 0.

    ``operands``: where the gradients behind the layer, and its weights, are. ``outputs``: where it goes, where what the
    forward pass saved of the layer below is, of relu its signs, and where its activation goes, if that is wanted.
    ``gates``: where linear gates of the inputs are, see :meth:`GateGradients.members`.
    """
    width, depth = level.widths[layer : layer + 2]
    start, sizes = members
    lengths = (level.num_rows, width, depth, level.like.itemsize)
    if code:
        tile = tiles.hidden_gradient(level.kind, level.num_rows, width, code, card(level.like.device))
        sums = tiles.input_sums(tile, sizes, *lengths)
    else:
        tile, sums = tiles.inputs(level.kind, sizes, *lengths, card(level.like.device))
    if gates is not None:
        tile = tiles.roomy(tile)
    shares = split(table, sums, level.like)
    at, kept, activated = outputs
    places = (*operands, start, at, kept, activated or 0, gates or 0)
    constants = {
        "KIND": level.kind,
        "CODE": code,
        "ACTIVATED": activated is not None,
        "LINEAR_GATES": gates is not None,
        "SPLIT": shares.count > 1,
    }

    even = None if code or shares.count > 1 else tiles.even_input(level.kind, tile, width)
    if even is not None:
        return _wide(level, even, shares.programs, (*operands, start, at, gates or 0), len(sizes), (width, depth))

    def run(entries: Tensor) -> Launch | None:
        numbers = (*places, *shares.arguments, len(sizes), level.num_rows, width, depth)
        return launch(input_gradient, shares.programs, tile, entries, *numbers, **constants)

    return run


def _wide(
    level: LevelShape, tile: Tile, programs: int, places: tuple[int, ...], groups: int, widths: tuple[int, int]
) -> Run:
    """The gradient of a network's inputs by programs that share its columns evenly."""
    constants = {"KIND": level.kind, "LINEAR_GATES": places[-1] > 0, **tiles.piece_constants(tile)}

    def run(entries: Tensor) -> Launch | None:
        numbers = (*places, groups, level.num_rows, *widths)
        return launch(wide_input_gradient, programs, tile, entries, *numbers, **constants)

    return run


def parameters_gradient(
    level: LevelShape,
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
    level: LevelShape,
    table: Table,
    experts: Sequence[Parameters],
    gates: Sequence[Parameters],
    need_weights: bool,
    need_biases: bool,
) -> Run:
    """The gradients of the weights and biases of experts' layers, of linear gates, or of both."""
    shapes = [(part.members, part.height, part.width if need_weights else 1) for part in (*experts, *gates)]
    tile, sums = tiles.weights(level.kind, shapes, level.num_rows, level.like.itemsize, card(level.like.device))
    layers: list[int] = []
    blocks = 0
    for part, shape in zip((*experts, *gates), shapes, strict=True):
        layers += [blocks, *part]
        blocks += tiles.weight_blocks(tile, *shape)
    at_layers = table.integers(layers)
    shares = split(table, sums, level.like)
    constants = {
        "KIND": level.kind,
        "NEED_WEIGHTS": need_weights,
        "NEED_BIASES": need_biases,
        "LINEAR_GATES": len(gates) > 0,
        "SPLIT": shares.count > 1,
    }

    def run(entries: Tensor) -> Launch | None:
        numbers = (at_layers, *shares.arguments, len(experts) + len(gates), len(experts), level.num_rows)
        return launch(weight_gradient, shares.programs, tile, entries, *numbers, **constants)

    return run
