"""From checked arguments to the operators: what of a level is static, and in which of its ways it is run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels import _backends, _torch
from mtlkernels.ops._call import (
    apply,
    needs_function,
    run_forward,
    run_operator,
    traced_under_func,
    under_autocast,
    wants_derivatives,
)
from mtlkernels.ops._linears import joint_linear
from mtlkernels.ops.level import serving  # noqa: F401  (it registers level_serve)
from mtlkernels.ops.level.autograd import Level, Plan
from mtlkernels.ops.level.checks import Arguments, check_memory_of_arguments
from mtlkernels.ops.level.norms import (
    Norm,
    check_rows,
    fold_gate_norms,
    fold_running,
    others,
    parameters,
    scales_of_running,
    update_running_statistics,
)
from mtlkernels.ops.level.spec import LAYER_NORM, Layer, LevelSpec
from mtlkernels.routing import Routing, Wiring

# Of a routing, kept: a rate of dropout that changes with every step must not fill the memory.
_MAX_SPECS = 64


def spec_of(wiring: Wiring, num_inputs: int, layers: tuple[Layer, ...], linear_gates: bool) -> LevelSpec:
    """The spec of the experts that some gate mixes; of one input everybody reads that.

    It is kept with the wiring, but not while the compiler traces, which would guard on what is kept.
    """
    key = (num_inputs, layers, linear_gates)
    compiling = _torch.compiling()
    spec = None if compiling else wiring.specs.get(key)
    if spec is None:
        one, gates = num_inputs == 1, len(wiring.gate_sizes)
        streams = (0,) * len(wiring.live) if one else wiring.expert_inputs
        gate_inputs = ((0,) * gates if one else tuple(range(gates))) if linear_gates else ()
        spec = LevelSpec(num_inputs, streams, wiring.gate_experts, wiring.gate_sizes, layers, gate_inputs)
        if not compiling:
            if len(wiring.specs) == _MAX_SPECS:
                wiring.specs.clear()
            wiring.specs[key] = spec
    return spec


def evaluate(given: Arguments, routing: Routing) -> tuple[Tensor, ...]:
    """The level's outputs; the running statistics of norms are then brought up to date."""
    serves, folded = _serves(given), _folded(given)
    keeps = serves and _keeps_norms(given)
    if folded:
        check_memory_of_arguments(given)
    if folded and not keeps and _folds_in_float16(given, folded):
        with torch.autocast(given.streams[0].device.type, enabled=False):
            return tuple(y.to(torch.float16) for y in evaluate(_in_float32(given), routing))
    wiring, layers, biases = routing.wiring, given.layers, given.biases
    norms = others(given.norms) if keeps else fold_running(given.norms, layers, biases)
    present = [norm for norm in norms if norm is not None]
    spec, gates, linear = _gates(given, wiring, _static(given, norms), serves, keeps)
    scales, shifts = _scales(given, wiring, linear) if keeps else ((), ())

    weights = [weight for layer in layers for weight in layer]
    of_norms = _of_norms_and_slopes(norms, given.slopes, spec, routing.num_experts)
    if given.streams[0].dtype == torch.float32:
        of_norms = list(map(_widened, of_norms))
    of_experts = [weights, biases, *of_norms]
    check_rows(present, given.streams[0].shape[0])
    streams, of_experts[:2], cast_gates = under_autocast(given.streams[0], given.streams, of_experts[:2], gates)
    # Gate k outside of the level reads stream k, or the only one.
    outside = range(len(wiring.gate_sizes)) if given.gates is not None and not linear else ()
    idle = list(map(streams.__getitem__, sorted(set(spec.unread).difference(outside))))
    if wiring.idle:
        idle += [t for ts in of_experts for t in _of_experts(ts, wiring.idle, routing) if t is not None]
        of_experts = [_of_experts(ts, wiring.live, routing) for ts in of_experts]
    tensors = list(chain(streams, *of_experts, *(cast_gates if linear else gates)))

    drops, backend = any(given.dropout), _backends.forced()
    seed = torch.randint(0, 2**63 - 1, (1,), device=streams[0].device) if drops else None
    traced = traced_under_func("expert_mixture")

    def written(saved: Sequence[Tensor]) -> None:
        update_running_statistics(present, wiring.live, spec.split_saved(saved)[1], streams[0].shape[0])

    early = len(present) > 0 and not _torch.func_transforms_active()  # whose examples' statistics are seen from outside
    # The compiler differentiates the operator itself, and so sees which outputs nobody uses.
    if not _torch.compiling() and needs_function(tensors):
        results = apply(Level, Plan(spec, backend, written=written if early else None), *tensors, seed)
        if early:
            return _with_zeros(spec.split_results(results)[0], idle)
    elif keeps:
        operands = spec.operands(tensors)
        return tuple(run_operator("level", "serve", backend, streams[0], *operands, scales, shifts, *spec.encoded))
    else:
        args = (*spec.operands(tensors), *spec.encoded, seed, False)
        results = run_forward("level", "reference" if traced else backend, streams[0], *args)
    outputs, saved = spec.split_results(results)
    if present:
        written(saved)
    return _with_zeros(outputs, idle)


def _folded(given: Arguments) -> list[Any]:
    """The norm modules by running statistics, of layers and gates."""
    of_layers = [module for norm in given.norms if norm is not None and norm.running for module in norm.modules]
    return of_layers + _gate_norms(given)


def _folds_in_float16(given: Arguments, modules: Sequence[Any]) -> bool:
    """Whether norms would be folded into weights of float16, and are to be computed in float32 instead.

    Of a small or large scale, folded weights and their gradients leave float16's range where neither the weights nor
    the gradients that are asked for do. A GPU, where products in float32 take many times as long, folds in float16 what
    nobody differentiates.
    """
    if _dtype_of_products(given.streams[0]) is not torch.float16:
        return False
    return given.streams[0].is_cpu or _is_differentiated(given, modules)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    device = x.device.type
    casts = x.dtype is not torch.float64 and _backends.autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


def _in_float32(given: Arguments) -> Arguments:
    """With tensors of half precision cast, differentiably; norms are modules, whose own are cast when they are read."""
    gates = given.gates and (_widened(given.gates[0]), _widened(given.gates[1]), given.gates[2])
    return given._replace(
        streams=_widened(given.streams),
        layers=[_widened(layer) for layer in given.layers],
        biases=_widened(given.biases),
        slopes=_widened(given.slopes),
        logits=_widened(given.logits),
        gates=gates,
    )


def _widened(tensors: Sequence[Any]) -> list[Any]:
    """Those of half precision in float32."""
    half = (torch.float16, torch.bfloat16)
    return [t.float() if t is not None and t.dtype in half else t for t in tensors]


def _of_norms_and_slopes(norms: Sequence[Norm | None], slopes: Any, spec: LevelSpec, num_experts: int) -> list[Any]:
    """Parameters of all experts, kind by kind, beside weights and biases."""
    found: list[Any] = []
    if spec.has_norms:
        everyone = range(num_experts)
        found += [parameters(norms, part, everyone) for part in ("weight", "bias")]
    if spec.has_slopes:
        found.append(slopes)
    return found


def _static(given: Arguments, norms: Sequence[Norm | None]) -> tuple[Layer, ...]:
    """The layers, with these norms."""
    settings = [(0, 0.0) if norm is None else (norm.code, norm.eps) for norm in norms]
    of_layers = zip(given.codes, settings, given.dice_eps, given.dropout, strict=True)
    return tuple(Layer(code, *norm, dice_eps, rate) for code, norm, dice_eps, rate in of_layers)


def _gates(
    given: Arguments, wiring: Wiring, layers: tuple[Layer, ...], serves: bool, keeps: bool
) -> tuple[LevelSpec, Any, bool]:
    """The spec, what it has of gates (logits, or weights and biases), and whether these are linear gates inside of it.

    Transforms of torch.func and the compiler see further into a level whose logits come from outside, if gradients are
    wanted.
    """
    streams = given.streams
    spec = spec_of(wiring, len(streams), layers, False)
    if given.gates is None:
        return spec, (given.logits, ()), False
    linear = not spec.stores_inputs and (serves or not _transformed())
    gates = given.gates[:2] if linear and keeps else fold_gate_norms(*given.gates)
    if linear:
        return spec_of(wiring, len(streams), layers, True), gates, True
    return spec, (gate_logits(streams, *gates), ()), False


def _scales(given: Arguments, wiring: Wiring, linear: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """What batch norms in evaluation make of products: their scales and shifts, of layers and then of linear gates."""
    own = given.gates[1:] if linear and given.gates is not None else None
    return scales_of_running(given.norms, given.biases, wiring.live, own)


def _serves(given: Arguments) -> bool:
    """Whether a graph, or a call in float16, is one that nobody differentiates and that leaves nothing but its outputs.

    In float16 norms should not be folded.
    """
    asked = _torch.compiling() or _dtype_of_products(given.streams[0]) is torch.float16
    if not asked or _torch.func_transforms_active() or any(given.dropout):
        return False
    norms = [norm for norm in given.norms if norm is not None]
    if not all(norm.running or norm.code == LAYER_NORM for norm in norms):
        return False
    return not _is_differentiated(given, [*(module for norm in norms for module in norm.modules), *_gate_norms(given)])


def _gate_norms(given: Arguments) -> list[Any]:
    return [] if given.gates is None else [module for module in given.gates[2] if module is not None]


def _is_differentiated(given: Arguments, norms: Sequence[Any]) -> bool:
    """Whether anybody may want gradients of a call with such norm modules."""
    weights, biases, _ = given.gates or ((), (), ())
    of_norms = [part for module in norms for part in (module.weight, module.bias)]
    experts = [weight for layer in given.layers for weight in layer]
    return wants_derivatives(
        given.streams, experts, given.biases, given.slopes, given.logits, weights, biases, of_norms
    )


def _keeps_norms(given: Arguments) -> bool:
    """Whether norms by running statistics stay outside of weights: the C++ kernels take them as they are.

    Behind layers that are stored the logits come from outside, with norms folded into the gates.
    """
    x = given.streams[0]
    if not (x.is_cpu and _backends.has_cpp("level") and _backends.forced() in (None, "cpp")):
        return False
    stored = any(norm is not None and norm.code == LAYER_NORM for norm in given.norms) or any(
        slopes is not None for slopes in given.slopes
    )
    return not (stored and _gate_norms(given) and _dtype_of_products(x) is torch.float16)


def _transformed() -> bool:
    return _torch.compiling() or _torch.func_transforms_active()


def gate_logits(streams: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The logits of gates that are linear layers: one product where they read one stream."""
    if len(streams) == 1 and all((bias is None) == (biases[0] is None) for bias in biases):
        return joint_linear(streams[0], weights, [bias for bias in biases if bias is not None])
    rows = streams if len(streams) > 1 else [streams[0]] * len(weights)
    return [F.linear(x, weight, bias) for x, weight, bias in zip(rows, weights, biases, strict=False)]


def _of_experts(tensors: Sequence[Any], experts: Sequence[int], routing: Routing) -> list[Any]:
    """Those of some experts in a list over layers, then experts."""
    return [tensors[at + e] for at in range(0, len(tensors), routing.num_experts) for e in experts]


def _with_zeros(outputs: Sequence[Tensor], idle: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs; from any of them ``idle``, experts' parameters and inputs that it does without, get zeros."""
    wanted = [tensor for tensor in idle if wants_derivatives([tensor])]
    if not wanted:
        return tuple(outputs)
    zero = torch.stack([tensor[:0].sum().to(outputs[0].dtype) for tensor in wanted]).sum()
    return tuple(y + zero for y in outputs)
