"""A level of experts and gates, evaluated by as few operators as its modules allow at that moment.

All is read at each call, so that weights are never stale, and so that whatever is done to the modules later (training
of batch norm or dropout, an exchanged layer) is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain, flatten, path_of, read_chain, refusal
from mtlkernels._convert.gates import Gate, has_equal_shares, linear_gates, logits_of
from mtlkernels._convert.mlp import Layer, Rows, drops, fusible, in_trial, join, kind_of, odd_weight, rows_of
from mtlkernels.ops.level import expert_mixture
from mtlkernels.ops.gated_mixture import mix_list
from mtlkernels.routing import Routing

# Measured with torch-rechub's and deepctr-torch's PLE: on fewer rows than this, one operator for all mixing saves
# nothing where the experts' modules are called.
MIXING_ROWS = 256


class Parts(NamedTuple):
    """What a level is made of now.

    ``kinds`` has for each expert what :func:`kind_of` says, or None where its modules have to be called; ``rows`` is
    what :func:`rows_of` says; ``gate_inputs`` the number of each gate's stream, None where gate k reads stream k.
    """

    chains: Sequence[Chain]
    layers: Sequence[list[Layer] | str]
    kinds: Sequence[Any]
    gates: Sequence[Gate]
    routing: Routing
    rows: Rows
    gate_inputs: Sequence[int] | None = None


def is_whole(parts: Parts) -> bool:
    """Whether one ``expert_mixture`` evaluates all of it."""
    # No property: torch 2.10 compiles none of a NamedTuple.
    kinds = parts.kinds
    return kinds[0] is not None and kinds.count(kinds[0]) == len(kinds) and not any_drops(parts.gates)


def any_drops(gates: Sequence[Gate]) -> bool:
    """Whether some gate has a dropout behind its softmax that drops now."""
    return any(drops(gate.dropout) for gate in gates)


def read_parts(
    chains: Sequence[Chain],
    gates: Sequence[Gate],
    routing: Routing,
    rows: Rows,
    gate_inputs: Sequence[int] | None = None,
) -> Parts:
    """The parts of a level from its experts' chains and its gates."""
    layers = [read_chain(chain) for chain in chains]
    kinds = [kind_of(x) if not isinstance(x, str) and fusible(x, rows) else None for x in layers]
    return Parts(chains, layers, kinds, gates, routing, rows, gate_inputs)


def left_to_modules(chains: Iterable[Chain], rows: Tensor) -> bool:
    """Whether a level's own code is as fast: its experts cannot be fused now, as the first one tells, and rows are few.

    What the compiler makes of the library's own mixing is as fast at any size.
    """
    if in_trial() or (not torch.compiler.is_compiling() and rows.shape[0] >= MIXING_ROWS):
        return False
    layers = read_chain(next(iter(chains)))
    return isinstance(layers, str) or not fusible(layers, rows_of(rows))


def evaluate(parts: Parts, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The level's K outputs; inputs that no expert reads come last."""
    gates, routing = parts.gates, parts.routing
    if len(inputs) == 1:
        read = list(inputs) * len(gates)
    else:
        read = list(inputs[: len(gates)] if parts.gate_inputs is None else [inputs[i] for i in parts.gate_inputs])
    sizes = routing.wiring.gate_sizes
    if not is_whole(parts):
        return _mix(_expert_outputs(parts, inputs), logits_of(gates, read, sizes), gates, routing)
    weights, biases, options = join(parts.layers)  # type: ignore[arg-type]
    single = all(x is inputs[0] for x in inputs)
    streams = inputs[0] if single else list(inputs[: routing.num_inputs])
    own = parts.gate_inputs is None and len(inputs) == routing.num_inputs
    linear = linear_gates(gates, parts.rows) if single or own else None
    if linear is not None:
        return expert_mixture(streams, weights, biases, None, routing, **options, **linear)
    logits = logits_of(gates, read, sizes)
    return expert_mixture(streams, weights, biases, logits, routing, **options)


def _expert_outputs(parts: Parts, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Each expert's output: those of a kind from one ``expert_mixture``, the others from their modules."""
    outputs: list[Any] = [None] * len(parts.chains)
    streams = [inputs[stream if len(inputs) > 1 else 0] for stream in parts.routing.expert_inputs]
    groups: dict[Any, list[int]] = {}
    for e, kind in enumerate(parts.kinds):
        groups.setdefault(kind, []).append(e)
    for kind, members in groups.items():
        if kind is None:
            found: Sequence[Tensor] = [_run(parts.chains[e], streams[e]) for e in members]
        else:
            found = _together([parts.layers[e] for e in members], [streams[e] for e in members])
        for e, y in zip(members, found, strict=True):
            outputs[e] = y
    return outputs


def _run(chain: Chain, x: Tensor) -> Tensor:
    for module in flatten(chain):
        x = module(x)
    return x


def _together(experts: Sequence[Any], streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of experts of one kind: a gate that sees one expert gives that expert's output."""
    different: list[Tensor] = []
    numbers = []
    for x in streams:
        at = next((i for i, other in enumerate(different) if other is x), len(different))
        different += [x] if at == len(different) else []
        numbers.append(at)
    weights, biases, options = join(experts)
    routing = Routing(tuple(numbers), tuple((e,) for e in range(len(experts))))
    logits = streams[0].new_zeros(streams[0].shape[0], len(experts))
    inputs = different if len(different) > 1 else different[0]
    return expert_mixture(inputs, weights, biases, logits, routing, **options)


def _mix(
    outputs: list[Tensor], logits: Sequence[Tensor], gates: Sequence[Gate], routing: Routing
) -> tuple[Tensor, ...]:
    """The mixtures of experts' outputs."""
    if not any_drops(gates):
        return mix_list(outputs, logits, routing)
    mixed = []
    for x, gate, seen in zip(logits, gates, routing.gate_experts, strict=True):
        shares = x.softmax(dim=1)
        if drops(gate.dropout):
            shares = F.dropout(shares, gate.dropout.p)
        mixed.append(torch.matmul(shares.unsqueeze(1), torch.stack([outputs[e] for e in seen], dim=1)).squeeze(1))
    return tuple(mixed)


def describe(
    model: Any, chains: Sequence[Chain], gate_chains: Sequence[Chain], gates: Sequence[Gate]
) -> tuple[bool, str]:
    """Whether some experts of a level are fused, and the report's words for what becomes of it."""
    groups: dict[Any, list[list[Layer]]] = {}
    odd = []
    for chain in chains:
        found = read_chain(chain)
        if not isinstance(found, str):
            found = odd_weight(found) or found
        if isinstance(found, str):
            odd.append(found + path_of(model, chain, found))
        else:
            groups.setdefault(kind_of(found), []).append(found)
    fused = [_experts(len(group)) + _layers(group) for group in groups.values()]
    equal = sum(map(has_equal_shares, gates))
    count = f"{len(gates) - equal} gates" + (f" and {equal} means" if equal else "")
    if len(fused) == 1 and not odd:
        words = f"{fused[0]} and {count} in one expert_mixture"
    else:
        parts = [f"{group} in one expert_mixture" for group in fused]
        parts += [f"{_experts(len(odd))} as modules, because of {odd[0]}"] if odd else []
        words = ", ".join([*parts, f"{count} in one gated_mixture"])
    for k, (gate, chain) in enumerate(zip(gates, gate_chains, strict=True)):
        if gate.layers is None:
            reason = refusal(gate.modules) or ""
            words += f"; gate {k} as modules, because of {reason}{path_of(model, chain, reason)}"
        if gate.dropout is not None and gate.dropout.p > 0:
            words += f"; gate {k} with dropout {gate.dropout.p} of its shares, mixed by itself in training"
    return bool(fused), words


def _experts(count: int) -> str:
    return "1 expert" if count == 1 else f"{count} experts"


def _layers(experts: Sequence[Sequence[Layer]]) -> str:
    """What the experts of a group are made of."""
    layers = [layer for expert in experts for layer in expert]
    depth = len(experts[0])
    kinds = {type(layer.norm) for layer in layers}
    parts = [name for kind, name in ((nn.BatchNorm1d, "batch norm"), (nn.LayerNorm, "layer norm")) if kind in kinds]
    rate = max((layer.dropout.p for layer in layers if layer.dropout is not None), default=0)
    parts += [f"dropout {rate}"] if rate > 0 else []
    words = f" of {depth} layers" if depth > 1 else " of 1 layer"
    return words + (f" with {' and '.join(parts)}" if parts else "")
