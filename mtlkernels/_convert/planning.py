"""The one planner: what becomes of an instance of a class with levels, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.arguments import Told, Tried, told
from mtlkernels._convert.chains import Chain, Product, flatten, path_of, read_chain, refusal
from mtlkernels._convert.classes import is_torchs
from mtlkernels._convert.copies import tensors_in
from mtlkernels._convert.description import TrunkDescription, one_argument
from mtlkernels._convert.dropouts import widths_dropped
from mtlkernels._convert.evaluation import several_dtypes
from mtlkernels._convert.gates import Gate, has_equal_shares, size_of
from mtlkernels._convert.levels import LevelDescription
from mtlkernels._convert.random_states import kept_random_state
from mtlkernels._convert.report import Line
from mtlkernels._convert.trial import NotFused, Verdict, disagreement
from mtlkernels.ops._checks import check_routing
from mtlkernels.ops._fusing import Layer, has_gradient_hooks, has_hooks, kind_of, weight_refusal
from mtlkernels.ops._operands import has_memory
from mtlkernels.routing import Routing


class Plan(NamedTuple):
    """What becomes of an instance.

    ``routings`` has for each level its Routing, None for one that is left alone, and is None where all are; ``lines``
    is the report; ``own_under_autocast`` whether its own code is to run under autocast; ``tried`` with which arguments
    it was tried, and with how many streams, None where calls with others are no matter.
    """

    routings: tuple[Routing | None, ...] | None
    lines: list[Line]
    own_under_autocast: bool = False
    tried: Tried | None = None


def left_alone(reason: str, module: nn.Module, path: str) -> Plan:
    """The plan of a module of which nothing can be fused."""
    return Plan(None, [Line("left alone", path, type(module).__name__, reason)])


def plan_trunk(trunk: TrunkDescription, base: Any, module: nn.Module, path: str) -> Plan:
    """The plan of a module of class ``base``, once it has proved right in a trial."""
    try:
        plan = _examine(trunk, base, module)
    except Exception as error:  # of a description that does not fit; it goes into the report
        plan = f"its description does not fit: {type(error).__name__}: {error}"
    verdict, tried = (Verdict(plan), None) if isinstance(plan, str) else _trial(trunk, module, plan)
    reason, under_autocast = verdict or (None, None)
    if isinstance(plan, str) or reason is not None:
        return left_alone(str(reason), module, path)
    levels, name = trunk.levels(module), type(module).__name__
    names = [f"{name} level {i}" for i in range(len(levels))] if len(levels) > 1 else [name]
    lines = [_replaced_line(level, module, path, part) for level, part in zip(levels, names, strict=True)]
    if under_autocast is not None:
        words = f"; its own code under autocast: {under_autocast}"
        lines = [replace(line, detail=line.detail + words) for line in lines]
    return Plan(plan, lines, under_autocast is not None, tried)


def _examine(trunk: TrunkDescription, base: Any, module: Any) -> tuple[Routing, ...] | str:
    """The routings of levels that can be evaluated otherwise, or why they cannot, as far as their parts tell."""
    refused = trunk.refusal(module) or _memory_refusal(module)
    if refused is not None:
        return refused
    if getattr(type(module), trunk.method) is not getattr(base, trunk.method) or trunk.method in vars(module):
        return f"its {trunk.method} is not that of {base.__name__}"
    plan = []
    for level in trunk.levels(module):
        routing = level.routing(module)
        check_routing(routing)
        reason = _level_refusal(level, module, routing)
        if reason is not None:
            return reason
        plan.append(routing)
    return tuple(plan) or "it has no levels"


def _listed(name: str, chains: Any) -> list[Chain]:
    """What a description's function returned, an entry an expert or a gate."""
    if not isinstance(chains, Iterable):
        raise TypeError(f"{name} must return a sequence, got {type(chains).__name__}")
    return list(chains)


def _level_refusal(level: LevelDescription, module: Any, routing: Routing) -> str | None:
    chains, gate_chains = _listed("experts", level.experts(module)), _listed("gates", level.gates(module))
    gates = level.read_gates(module)
    if not chains:
        return "it has no experts"
    refused = _hook_refusal(module, level.parts(module)) or _quantized_refusal(module, chains + gate_chains)
    if refused is not None:
        return refused
    for chain in chains:
        layers = read_chain(chain)
        odd = None if isinstance(layers, str) else weight_refusal(layers)  # which copies for a trial would not have
        if odd is not None:
            return odd + path_of(module, chain, odd)
    for gate, chain in zip(gates, gate_chains, strict=True):
        if isinstance(gate, str):
            return gate + path_of(module, chain, gate)
    if (len(chains), len(gates)) != (routing.num_experts, routing.num_gates):
        return f"it has {len(chains)} experts and {len(gates)} gates, but its routing {routing}"
    for k, (gate, mixed) in enumerate(zip(gates, routing.gate_experts, strict=True)):
        if size_of(gate) not in (None, len(mixed)):
            return f"gate {k} has {size_of(gate)} logits for {len(mixed)} experts"
    if several_dtypes(list(map(read_chain, chains)), gates):
        return "its parameters are of several dtypes"
    at = level.read_gate_inputs(module, gates, routing)
    if at is not None and len(at) != len(gates):
        return f"its gate_inputs have {len(at)} entries for {len(gates)} gates"
    return None


def _hook_refusal(model: nn.Module, parts: Iterable[Any]) -> str | None:
    """The report's words for a part that does more than its class's forward, and that would not be called."""
    inner = (module for part in parts if part is not None for module in part.modules())
    hooked = next((module for module in inner if has_hooks(module) or has_gradient_hooks(module)), None)
    if hooked is None:
        return None
    name = next((name for name, module in model.named_modules() if module is hooked), "") or type(hooked).__name__
    if not has_hooks(hooked):
        return f"a parameter of {name} has a hook, which would be called without a gradient where no loss reaches it"
    what = "a forward of its own" if "forward" in vars(hooked) else "a hook"
    return f"{name} has {what}, and would not be called"


def _memory_refusal(model: nn.Module) -> str | None:
    """The report's words for a tensor whose values a trial cannot copy, as there are none: a read would be a crash."""
    for name, module in model.named_modules():
        held = {**vars(module), "_parameters": None, "_buffers": None, **module._parameters, **module._buffers}
        for attribute, value in held.items():
            if any(not has_memory(tensor) for tensor in tensors_in(value)):
                return (
                    f"{name}{'.' * bool(name)}{attribute} has no memory now, as where FullyShardedDataParallel has"
                    " taken its values; convert it before it is wrapped"
                )
    return None


def _quantized_refusal(model: nn.Module, chains: Iterable[Chain]) -> str | None:
    """The report's words for a layer that PyTorch has quantized, which keeps its numbers as no tensors."""
    steps = (step for chain in chains for step in flatten(chain) if isinstance(step, nn.Module))
    layer = next((part for step in steps for part in step.modules() if _is_quantized(type(part))), None)
    if layer is None:
        return None
    name = next((f" ({name})" for name, module in model.named_modules() if module is layer), "")
    return f"its layers are quantized, and cannot be tried in float64{name}; convert it before it is quantized"


def _is_quantized(kind: type) -> bool:
    return is_torchs(kind) and "quantized" in kind.__module__.split(".")


def _trial(trunk: TrunkDescription, module: nn.Module, plan: Sequence[Routing]) -> tuple[Verdict | None, Tried | None]:
    """What is wrong with evaluating the levels otherwise, as a trial of copies tells, and the arguments that it had.

    The verdict is None where nothing is wrong.
    """
    calls: list[Told] = []
    counts: set[int] = set()

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        if trunk.example is not None:
            given = _example(trunk.example, other, rows, generator)
        else:
            given = trunk.arguments(other, _random_streams(trunk.levels(other)[0], other, plan[0], rows, generator))
        calls.append(told(given))
        return given

    def fused(other: Any, *args: Any) -> Any:
        result = trunk.call(other, plan, args, {}, counts)
        if result is None:
            raise NotFused("inputs gave None, or no streams [B, D] of one B, for the arguments of the trial")
        return result[0]

    failed = False

    def original(other: Any, *args: Any) -> Any:
        nonlocal failed
        failed = True
        result = other(*args) if trunk.method == "forward" else getattr(other, trunk.method)(*args)
        failed = False
        return result

    def drops(other: Any, args: tuple[Any, ...]) -> tuple[dict[int, int | None], int]:
        levels, streams = trunk.levels(other), trunk.streams(other, args, {})
        chains = (chain for level in levels for chain in (*level.experts(other), *level.gates(other)))
        return widths_dropped(chains), len(streams[0]) if streams else 0

    options = {"method": trunk.method, "original": original, "drops": drops, **trunk.trial(module)}
    verdict = disagreement(module, fused, arguments, **options)
    alone = trunk.example is None and trunk.arguments is one_argument
    if failed and alone and verdict is not None and verdict.reason is not None:
        words = "; it was called with one tensor [B, D]: describe another call by inputs with arguments or example"
        if (count := plan[0].num_inputs) > 1:
            words = f"; its routing has {count} input streams, given in a list; single_input=True is for one"
        verdict = verdict._replace(reason=verdict.reason + words)
    return verdict, Tried.of(calls, counts)


def _random_streams(
    level: LevelDescription, module: Any, routing: Routing, rows: int, generator: torch.Generator
) -> list[Tensor]:
    """Input streams for a trial of a level."""
    count, gates = routing.num_inputs, level.read_gates(module)
    at = level.read_gate_inputs(module, gates, routing)
    if at is not None:
        count = max([count, *(i + 1 for i, gate in zip(at, gates, strict=True) if not has_equal_shares(gate))])
    elif level.num_streams is not None:
        count = level.num_streams(module)
    elif count > 1:  # without shared experts, a shared gate alone reads the last stream
        count = max(count, routing.num_gates)
    if at is None:
        at = range(len(gates)) if count > 1 else [0] * len(gates)
    readers = [
        *zip(routing.expert_inputs, level.experts(module), strict=True),
        *zip(at, level.gates(module), strict=True),
    ]
    widths: dict[int, int] = {}
    for stream, chain in readers:
        width = None if stream in widths else _width(chain)
        if width is not None:
            widths[stream] = width
    if not widths:
        raise ValueError("no layer of its experts and gates has a matrix, which would tell how wide its inputs are")
    usual = next(iter(widths.values()))  # of a stream of which no reader tells
    shapes = [(rows, widths.get(stream, usual)) for stream in range(count)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _width(chain: Chain) -> int | None:
    """How wide a stream is that a chain reads, None where no step of it tells."""
    steps = [step for step in flatten(chain) if isinstance(step, (nn.Module, Product))] if chain is not None else []
    return next((found for found in map(_features, steps) if found is not None), None)


def _features(step: nn.Module | Product) -> int | None:
    """How many features a step of a chain takes: its first matrix has as many columns; None where it has none."""
    if isinstance(step, nn.Module):
        linear = next((part for part in step.modules() if isinstance(part, nn.Linear)), None)
        if linear is not None:  # of which a parametrization may have made other matrices
            return linear.in_features
    return next((p.shape[1] for p in step.parameters() if p.dim() == 2), None)


def _example(
    example: Callable[[Any, int], tuple[Any, ...]], module: Any, rows: int, generator: torch.Generator
) -> tuple[Any, ...]:
    """A user's example with numbers in float64; its random ones are not taken for the forward's."""
    with kept_random_state():
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        given = example(module, rows)
    leaves, structure = _torch.tree_flatten(tuple(given))
    double = [leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    arguments: tuple[Any, ...] = _torch.tree_unflatten(double, structure)
    return arguments


def _replaced_line(level: LevelDescription, module: nn.Module, path: str, part: str) -> Line:
    """The report's line for a level that is replaced, or of which only the mixing is."""
    gate_chains, gates = level.gates(module), level.read_gates(module)
    fused, detail = _describe(module, list(level.experts(module)), gate_chains, gates)
    return Line("replaced" if fused else "mixing fused", path, part, detail)


def _describe(
    model: Any, chains: Sequence[Chain], gate_chains: Sequence[Chain], gates: Sequence[Gate]
) -> tuple[bool, str]:
    """Whether some experts of a level are fused, and the report's words for what becomes of it."""
    groups: dict[Any, list[list[Layer]]] = {}
    odd = []
    for chain in chains:
        layers = read_chain(chain)
        if not isinstance(layers, str):
            layers = weight_refusal(layers) or layers
        if isinstance(layers, str):
            odd.append(layers + path_of(model, chain, layers))
        else:
            groups.setdefault(kind_of(layers), []).append(layers)
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
