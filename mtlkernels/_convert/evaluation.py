"""A level of experts and gates, evaluated by as few operators as its modules allow at that moment.

All is read at each call, or compared with what was read, so that weights are never stale, and so that whatever is done
to the modules later (training of batch norm or dropout, an exchanged layer) is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.calls import Serving
from mtlkernels._convert.chains import Chain, Product, flatten, read_chain, run_chain
from mtlkernels._convert.gates import Gate, linear_gates, logits_of
from mtlkernels._convert.paying import SMALL_EXPERT, Size
from mtlkernels.ops._fusing import Layer, Rows, common, drop_rate, join, kind_of, slopes_of
from mtlkernels.ops.gated_mixture import mix_list
from mtlkernels.ops.level import expert_mixture
from mtlkernels.routing import Routing


class Parts(NamedTuple):
    """What a level is made of now.

    ``kinds`` has for each expert what :func:`kind_of` says, or None where its modules have to be called; ``rows`` is
    what the call's number of rows allows; ``gate_inputs`` the number of each gate's stream, None where gate k reads
    stream k.
    """

    chains: Sequence[Chain]
    layers: Sequence[list[Layer] | str]
    kinds: Sequence[Any]
    gates: Sequence[Gate]
    routing: Routing
    rows: Rows
    gate_inputs: Sequence[int] | None = None


def held_by(parts: Parts) -> Iterator[Any]:
    """The modules and tensors of a level's parts."""
    for weight, bias, norm, _, dropout, sloped in _layers(parts.layers, parts.gates):
        yield from (part for part in (weight, bias, norm, dropout, sloped) if part is not None)
    called = (*map(flatten, parts.chains), *((*gate.modules, gate.dropout) for gate in parts.gates))
    yield from (step for steps in called for step in steps if isinstance(step, (nn.Module, Product)))


def read_experts(chains: Sequence[Chain], size: Size) -> tuple[list[list[Layer] | str], list[Any]] | None:
    """Each expert's layers and kind.

    None where the level's own code is as fast: where none can be fused now, as the first tells, and mixing does not
    pay; or where the kinds differ, and several calls do not pay.
    """
    if not size.fused:
        return None
    experts: list[list[Layer] | str] = []
    kinds: list[Any] = []
    parts = size.parts
    for chain in chains:
        layers = read_chain(chain)
        kind = None
        if not isinstance(layers, str) and (size.layer_norm or not _has_norm(layers, nn.LayerNorm)):
            kind = kind_of(layers, size.rows)
        if kind is None and not kinds and not _mixing_pays(chain, size):
            return None
        if not isinstance(layers, str):
            parts = parts and (size.normed_parts or not _has_norm(layers, nn.BatchNorm1d))
            parts = parts and (size.small_parts or sum(layer.weight.numel() for layer in layers) >= SMALL_EXPERT)
        if not parts and kinds and kind != kinds[0]:
            return None
        experts.append(layers)
        kinds.append(kind)
    read = (layer for layers in experts if not isinstance(layers, str) for layer in layers)
    norms = [norm for _, _, norm, *_ in read if type(norm) is nn.BatchNorm1d]
    # A norm of several layers takes several batches to its statistics, one after another. By hash: the compiler would
    # guard each id.
    if len(set(norms)) < len(norms):
        return (experts, [None] * len(kinds)) if _mixing_pays(chains[0], size) else None
    return experts, kinds


def _mixing_pays(chain: Chain, size: Size) -> bool:
    """Whether one operator for all mixing does, where experts, of which ``chain`` is one, are called."""
    return size.mixing and (size.bare_mixing or all(type(step) is not Product for step in flatten(chain)))


def _has_norm(layers: Sequence[Layer], kind: type[nn.Module]) -> bool:
    """Whether some layer of an expert has a norm of that class."""
    return any(type(layer.norm) is kind for layer in layers)


def _layers(experts: Sequence[list[Layer] | str], gates: Sequence[Gate]) -> Iterator[Layer]:
    """Those of experts and gates that are known."""
    for layers in (*experts, *(gate.layers for gate in gates)):
        if layers is not None and not isinstance(layers, str):
            yield from layers


def several_dtypes(
    experts: Sequence[list[Layer] | str], gates: Sequence[Gate], dtype: torch.dtype | None = None
) -> bool:
    """Whether fused operators would get tensors of other dtypes than one, or than ``dtype``.

    Code that calls such modules casts between them, or calls a norm that takes two dtypes; operators do neither.
    """
    for weight, bias, norm, _, _, sloped in _layers(experts, gates):
        if dtype is None:
            dtype = weight.dtype
        if weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
            return True
        of_norm = () if norm is None else (norm._parameters.get("weight"), norm._buffers.get("running_mean"))
        if any(t is not None and t.dtype is not dtype for t in of_norm) or (
            sloped is not None and slopes_of(sloped).dtype is not dtype
        ):
            return True
    return False


def any_of_inference(experts: Sequence[list[Layer] | str], gates: Sequence[Gate]) -> bool:
    """Whether a layer has a tensor that was made under ``torch.inference_mode``; no compiler traces such ones."""
    if _torch.compiling():
        return False
    for weight, bias, norm, _, _, sloped in _layers(experts, gates):
        of_modules = (part for part in (norm, sloped) if part is not None)
        inner = (t for part in of_modules for t in (*part._parameters.values(), *part._buffers.values()))
        if any(t is not None and t.is_inference() for t in (weight, bias, *inner)):
            return True
    return False


def evaluate(parts: Parts, inputs: Sequence[Tensor], serving: Serving | None = None) -> tuple[Tensor, ...]:
    """The level's K outputs; inputs that no expert reads come last."""
    gates, routing = parts.gates, parts.routing
    if len(inputs) == 1:
        read = list(inputs) * len(gates)
    else:
        read = list(inputs[: len(gates)] if parts.gate_inputs is None else [inputs[i] for i in parts.gate_inputs])
    sizes = routing.wiring.gate_sizes
    if common(parts.kinds) is None or any_drops(gates):
        return _mix(_expert_outputs(parts, inputs), logits_of(gates, read, sizes), gates, routing)
    weights, biases, options = join(parts.layers)  # type: ignore[arg-type]
    single = all(x is inputs[0] for x in inputs)
    streams = inputs[0] if single else list(inputs[: routing.num_inputs])
    in_order = parts.gate_inputs is None and len(inputs) == routing.num_inputs
    # Kernels for slopes take logits.
    linear = linear_gates(gates, parts.rows) if (single or in_order) and "slopes" not in options else None
    logits = logits_of(gates, read, sizes) if linear is None else None
    if linear is None and not single and not _torch.compiling():
        numbers, routing = _of_experts(routing)  # a stream that gates alone read has no gradient but by their logits
        streams = [inputs[i] for i in numbers]
    if serving is not None and linear is not None:
        serving.offer(inputs, streams, weights, biases, routing, linear, options)
    return expert_mixture(streams, weights, biases, logits, routing, **options, **(linear or {}))


@functools.lru_cache(64)
def _of_experts(routing: Routing) -> tuple[tuple[int, ...], Routing]:
    """The numbers of the streams that experts read, and the routing with these alone."""
    numbers = tuple(sorted(set(routing.expert_inputs)))
    if len(numbers) == routing.num_inputs:
        return numbers, routing
    return numbers, Routing(tuple(map(numbers.index, routing.expert_inputs)), routing.gate_experts)


def _expert_outputs(parts: Parts, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Each expert's output: those of a kind from one ``expert_mixture``, the others from their modules."""
    outputs: list[Any] = [None] * len(parts.chains)
    streams = [inputs[stream if len(inputs) > 1 else 0] for stream in parts.routing.expert_inputs]
    groups: dict[Any, list[int]] = {}
    for e, kind in enumerate(parts.kinds):
        groups.setdefault(kind, []).append(e)
    for kind, members in groups.items():
        if kind is None:
            fresh: Sequence[Tensor] = [run_chain(parts.chains[e], streams[e]) for e in members]
        else:
            fresh = _one_by_one([parts.layers[e] for e in members], [streams[e] for e in members])
        for e, y in zip(members, fresh, strict=True):
            outputs[e] = y
    return outputs


def _one_by_one(experts: Sequence[Any], streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of experts of one kind: a gate that sees one expert gives that expert's output."""
    different: list[Tensor] = []
    for x in streams:
        if all(x is not other for other in different):
            different.append(x)
    numbers = tuple(next(i for i, other in enumerate(different) if other is x) for x in streams)
    weights, biases, options = join(experts)
    routing = Routing(numbers, tuple((e,) for e in range(len(experts))))
    logits = streams[0].new_zeros(streams[0].shape[0], len(experts))
    inputs = different if len(different) > 1 else different[0]
    return expert_mixture(inputs, weights, biases, logits, routing, **options)


def any_drops(gates: Sequence[Gate]) -> bool:
    """Whether some gate has a dropout behind its softmax that drops now."""
    return any(drop_rate(gate.dropout) > 0 for gate in gates)


def _mix(
    outputs: list[Tensor], logits: Sequence[Tensor], gates: Sequence[Gate], routing: Routing
) -> tuple[Tensor, ...]:
    """The mixtures of experts' outputs."""
    if not any_drops(gates):
        return mix_list(outputs, logits, routing)
    mixed = []
    for x, gate, seen in zip(logits, gates, routing.gate_experts, strict=True):
        shares = x.softmax(dim=1)
        rate = drop_rate(gate.dropout)
        if rate > 0:
            shares = F.dropout(shares, rate)
        mixed.append(torch.matmul(shares.unsqueeze(1), torch.stack([outputs[e] for e in seen], dim=1)).squeeze(1))
    return tuple(mixed)
