"""The arguments of expert_mixture: each check returns what it checked in the form in which it travels on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mtlkernels.ops._checks import (
    Like,
    as_sequence,
    check_dense,
    check_like,
    check_logits,
    check_parameter,
    check_routing,
    check_tensor,
    numbers_by_layer,
    shape_of,
)
from mtlkernels.ops._operands import check_memory_of_all
from mtlkernels.ops.activations import CODES, DICE, has_slopes
from mtlkernels.ops.level.norms import Norm, check_dropout, check_gate_norms, check_norms
from mtlkernels.routing import Routing

Check = Callable[[str, Tensor, str, Like], None]


class Arguments(NamedTuple):
    """Streams; then by layer: weights, activations, norms, dropout and eps; biases and slopes by layer, then expert.

    ``gates`` are weights, biases, and norms or none at all, of gates that are linear layers; otherwise None, and
    ``logits`` has an entry a gate.
    """

    streams: list[Tensor]
    layers: list[list[Tensor]]
    biases: list[Tensor | None]
    codes: tuple[int, ...]
    norms: list[Norm | None]
    dropout: tuple[float, ...]
    slopes: list[Tensor | None]
    dice_eps: tuple[float, ...]
    gates: tuple[list[Tensor], list[Tensor | None], list[Any]] | None
    logits: list[Tensor]


def check_arguments(
    inputs: Any,
    weights: Any,
    biases: Any,
    gate_logits: Any,
    routing: Any,
    activation: Any,
    gate_weights: Any,
    gate_biases: Any,
    gate_norms: Any,
    norms: Any,
    dropout: Any,
    slopes: Any,
    dice_eps: Any,
) -> Arguments:
    """See :func:`mtlkernels.expert_mixture`."""
    check_routing(routing)
    streams = check_inputs(inputs, routing)
    x = streams[0]
    like = Like(x.dtype, x.device, *x.shape)
    layers = check_weights(weights, routing, like)
    bias_list = check_biases(biases, layers, routing, like)
    codes = activation_codes(activation, len(layers))
    layer_norms = check_norms(norms, layers, routing, like)
    rates = check_dropout(dropout, len(layers))
    slope_list, epsilons = check_slopes(slopes, dice_eps, codes, layers, routing, like)
    of_layers = (streams, layers, bias_list, codes, layer_norms, rates, slope_list, epsilons)
    gates = check_gate_layers(gate_logits, gate_weights, gate_biases, len(streams), routing, like)
    modules = check_gate_norms(gate_norms, None if gates is None else gates[0], like)
    if gates is not None:
        return Arguments(*of_layers, (*gates, modules), [])
    return Arguments(*of_layers, None, check_logits(gate_logits, routing, like.rows, like))


def check_memory_of_arguments(given: Arguments) -> None:
    """The tensors of a call have the memory that their values take: PyTorch reads them without asking."""
    each = len(given.biases) // len(given.layers)
    check_memory_of_all("inputs", given.streams)
    check_memory_of_all("gate_logits", given.logits)
    for i, layer in enumerate(given.layers):
        check_memory_of_all(f"weights[{i}]", layer)
        check_memory_of_all(f"biases[{i}]", given.biases[i * each : (i + 1) * each])
        check_memory_of_all(f"slopes[{i}]", given.slopes[i * each : (i + 1) * each])
    if given.gates is not None:
        check_memory_of_all("gate_weights", given.gates[0])
        check_memory_of_all("gate_biases", given.gates[1])


def check_inputs(inputs: Any, routing: Routing) -> list[Tensor]:
    """The input streams."""
    if isinstance(inputs, Tensor):
        check_tensor("inputs", inputs, 2, "[B, D]")
        return [inputs]
    streams = list(as_sequence("inputs", inputs, "a tensor [B, D] or a sequence of them"))
    if len(streams) != routing.num_inputs:
        raise ValueError(
            f"inputs must be one tensor or hold the {routing.num_inputs} streams of this routing, got {len(streams)}"
        )
    for i, x in enumerate(streams):
        check_tensor(f"inputs[{i}]", x, 2, "[B, D]")
        check_like(f"inputs[{i}]", x, "inputs[0]", streams[0])
        if x.shape != streams[0].shape:
            raise ValueError(f"inputs[{i}] must have the shape of inputs[0], {shape_of(streams[0])}, got {shape_of(x)}")
    return streams


def _per_expert(
    name: str, value: Any, routing: Routing, like: Like, dim: int, shape: str, check: Check = check_like
) -> list[Tensor]:
    """A layer's E tensors, from one stacked tensor or from a sequence; ``check`` sees to dtype and device."""
    experts = routing.num_experts
    if isinstance(value, Tensor):
        check_tensor(name, value, dim + 1, f"[{experts}, {shape}]")
        check(name, value, "inputs", like)
        if value.shape[0] != experts:
            raise ValueError(f"{name} must have shape [{experts}, {shape}], got {shape_of(value)}")
        return list(value.unbind(0))
    tensors = list(as_sequence(name, value, f"a tensor [{experts}, {shape}] or a sequence of {experts} tensors"))
    if len(tensors) != experts:
        raise ValueError(f"{name} must hold a tensor for each of {experts} experts, got {len(tensors)}")
    for e, tensor in enumerate(tensors):
        check_tensor(f"{name}[{e}]", tensor, dim, f"[{shape}]")
        check(f"{name}[{e}]", tensor, "inputs", like)
    return tensors


def check_weights(weights: Any, routing: Routing, like: Like) -> list[list[Tensor]]:
    """For each layer, its E weights."""
    if isinstance(weights, Tensor):
        raise TypeError("weights must be a sequence with an entry a layer, got a tensor; wrap one layer in a list")
    layers = []
    width = like.width
    entries = as_sequence("weights", weights, "a sequence with an entry a layer")
    if not entries:
        raise ValueError("weights must hold at least one layer, got none")
    for i, entry in enumerate(entries):
        layer = _per_expert(f"weights[{i}]", entry, routing, like, 2, f"H_out, {width}")
        out = layer[0].shape[0]
        for e, tensor in enumerate(layer):
            if tensor.shape[0] != out or tensor.shape[1] != width:
                across = tensor.shape[0] == width and (e == 0 or tensor.shape[1] == out)
                hint = f": inputs have {width} features" if i == e == 0 else ""
                hint = ": transpose it, as rows are outputs here, as in nn.Linear" if across else hint
                rows = "H_out" if across and e == 0 else out  # `out` is its own, so that of one that lies across
                raise ValueError(f"weights[{i}][{e}] must have shape [{rows}, {width}], got {shape_of(tensor)}{hint}")
        layers.append(layer)
        width = out
    return layers


def check_biases(biases: Any, layers: list[list[Tensor]], routing: Routing, like: Like) -> list[Tensor | None]:
    """For each layer and expert its bias or None, in one list."""
    experts = routing.num_experts
    if biases is None:
        return [None] * (len(layers) * experts)
    if isinstance(biases, Tensor):
        raise TypeError("biases must be None or a sequence with an entry a layer, got a tensor; wrap it in a list")
    entries = as_sequence("biases", biases, "None or a sequence with an entry a layer")
    if len(entries) != len(layers):
        raise ValueError(f"biases must hold an entry for each of {len(layers)} layers, got {len(entries)}")
    flat: list[Tensor | None] = []
    for i, (entry, layer) in enumerate(zip(entries, layers, strict=True)):
        if entry is None:
            flat += [None] * experts
            continue
        out = layer[0].shape[0]
        tensors = _per_expert(f"biases[{i}]", entry, routing, like, 1, f"{out}")
        for e, tensor in enumerate(tensors):
            if tensor.shape[0] != out:
                raise ValueError(f"biases[{i}][{e}] must have shape [{out}], got {shape_of(tensor)}")
        flat += tensors
    return flat


def _per_gate(name: str, value: Any, sizes: list[int]) -> list[Any]:
    """An entry a gate, from a sequence or from one tensor in which the gates' rows follow each other."""
    if not isinstance(value, Tensor):
        return list(as_sequence(name, value, "a tensor or a sequence with an entry a gate"))
    check_dense(name, value)
    if value.dim() == 0 or value.shape[0] != sum(sizes):
        raise ValueError(f"{name} must have {sum(sizes)} rows, one for each expert of each gate, got {shape_of(value)}")
    return list(value.split(sizes))


def check_gate_layers(
    gate_logits: Any, gate_weights: Any, gate_biases: Any, num_inputs: int, routing: Routing, like: Like
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Weights and biases of gates that are linear layers; None where logits are given."""
    if gate_weights is None:
        if gate_biases is not None:
            raise ValueError("gate_biases must be None without gate_weights, got biases")
        if gate_logits is None:
            raise TypeError("gate_logits must be a tensor or a sequence of tensors, got NoneType and no gate_weights")
        return None
    if gate_logits is not None:
        raise ValueError("gate_logits must be None where gate_weights are given, got both")
    sizes = [len(gate) for gate in routing.gate_experts]
    if 1 < num_inputs < len(sizes):
        raise ValueError(
            f"gate_weights need an input for each of {len(sizes)} gates, or one for all, got {num_inputs} inputs: pass"
            " gate_logits"
        )
    weights = _per_gate("gate_weights", gate_weights, sizes)
    biases: list[Any] = [None] * len(sizes)
    if gate_biases is not None:
        biases = _per_gate("gate_biases", gate_biases, sizes)
    for name, entries in (("gate_weights", weights), ("gate_biases", biases)):
        if len(entries) != len(sizes):
            raise ValueError(f"{name} must hold an entry for each of {len(sizes)} gates, got {len(entries)}")
    for k, (weight, bias, size) in enumerate(zip(weights, biases, sizes, strict=True)):
        own: list[tuple[str, Any, tuple[int, ...]]] = [("gate_weights", weight, (size, like.width))]
        own += [] if bias is None else [("gate_biases", bias, (size,))]
        for name, tensor, shape in own:
            check_tensor(f"{name}[{k}]", tensor, len(shape), f"{list(shape)}")
            check_like(f"{name}[{k}]", tensor, "inputs", like)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}[{k}] must have shape {list(shape)}, got {shape_of(tensor)}")
    return weights, biases


def activation_codes(activation: Any, num_layers: int) -> tuple[int, ...]:
    """A code a layer."""
    names = (
        [activation] * num_layers
        if isinstance(activation, str)
        else as_sequence("activation", activation, "a name or a sequence of names")
    )
    if len(names) != num_layers:
        raise ValueError(f"activation must be one name or one for each of {num_layers} layers, got {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"activation must hold names, got {type(name).__name__}")
        if name not in CODES:
            raise ValueError(f"activation must be one of {', '.join(CODES)}, got {name!r}")
    return tuple(CODES[name] for name in names)


def check_slopes(
    slopes: Any, dice_eps: Any, codes: tuple[int, ...], layers: list[list[Tensor]], routing: Routing, like: Like
) -> tuple[list[Tensor | None], tuple[float, ...]]:
    """For each layer and expert the slopes of its activation or None, in one list; and the eps of each layer."""
    what = "None or a sequence with an entry a layer"
    entries = [None] * len(layers) if slopes is None else as_sequence("slopes", slopes, what)
    if len(entries) != len(layers):
        raise ValueError(f"slopes must hold an entry for each of {len(layers)} layers, got {len(entries)}")
    flat: list[Tensor | None] = []
    for i, (entry, layer, code) in enumerate(zip(entries, layers, codes, strict=True)):
        name, activation = f"slopes[{i}]", list(CODES)[code]
        if has_slopes(code) != (entry is not None):
            what = f"hold the slopes of {activation!r}" if entry is None else f"be None beside {activation!r}"
            raise ValueError(f"{name} must {what}, got {type(entry).__name__}")
        if entry is None:
            flat += [None] * routing.num_experts
            continue
        width = layer[0].shape[0]
        own = _per_expert(name, entry, routing, like, 1, f"{width} or 1", check_parameter)
        for e, tensor in enumerate(own):
            if tensor.shape[0] != width and tensor.shape[0] != 1:  # the compiler's sizes are in no tuple
                raise ValueError(f"{name}[{e}] must have shape [{width}] or [1], got {shape_of(tensor)}")
        flat += own
    epsilons = numbers_by_layer("dice_eps", "number", dice_eps, len(layers))
    for eps in epsilons:
        if not 0 < eps < float("inf"):
            raise ValueError(f"dice_eps must be positive and finite, got {eps}")
    return flat, tuple(eps if code == DICE else 0.0 for eps, code in zip(epsilons, codes, strict=True))
