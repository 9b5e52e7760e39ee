"""The way past checks and dispatcher, which would take as long as a small batch on a CPU, and longer on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _backends, _decisions, _extension
from mtlkernels.ops._call import casts_in_cpp, replays, unobserved
from mtlkernels.ops.activations import CODES, has_slopes
from mtlkernels.ops.level import layerwise, lists
from mtlkernels.ops.level.call import gate_logits, spec_of
from mtlkernels.ops.level.norms import running_parts
from mtlkernels.ops.level.spec import Layer
from mtlkernels.routing import Routing

_LISTS, _PLAIN = (list, tuple), (Tensor, nn.Parameter)
_NUMBERS = (int, float)
# Why a call is not for the direct way, where that is found out later, if anybody asks.
OBSERVED = "something looks on"
_LOGITS = "gates with norms, beside layers that are stored, are read behind checks"
_ODD = "the arguments are not plain tensors of one dtype in lists, of shapes that fit, and plain norms"
# A layer without more, of each activation.
_LAYERS = {name: Layer(code) for name, code in CODES.items()}


def direct(
    inputs: Any,
    weights: Any,
    biases: Any,
    gates: tuple[Any, Any, Any, Any],
    routing: Any,
    activation: Any,
    norms: Any,
    dropout: Any,
    slopes: Any,
    dice_eps: Any,
) -> tuple[Tensor, ...] | str:
    """The level's outputs from the public function's arguments; ``gates`` are logits, weights, biases and norms.

    C++ takes the tensors out of the caller's lists, checks them, and serves or trains; of a call that serves it keeps
    what it has read, for the next one. On a GPU it hands them back, for a recording of a call that was checked. Words
    say why this is not a call for it: somebody looks on, the arguments are not such as C++ takes, or do not fit each
    other. The checks in Python then find out why, in the caller's terms.
    """
    several = isinstance(inputs, _LISTS)
    first = inputs[0] if several and inputs else inputs
    if type(first) is not Tensor:
        return "inputs are not plain tensors"
    if not _extension.has_module():
        return "there is no direct way from this Python"
    if not (type(dice_eps) is float and 0.0 < dice_eps < math.inf) and not _are_eps(dice_eps, weights):
        return _ODD
    rates = _rates(dropout, weights)
    if rates is None:
        return _ODD
    plain = norms is None and slopes is None and not rates
    casting = first.is_cpu and casts_in_cpp()
    keeps = lists.known_by(weights, biases, gates, routing, activation) if plain and not casting else None
    if keeps is not None and first.is_cpu:
        kept = lists.kept_lists().serve(inputs, *keeps)
        if type(kept) is tuple:
            return kept
        keeps = None if kept is None else keeps
    on_gpu = not (first.is_cpu and unobserved(casting))
    if on_gpu and not replays("level", first.device, first.dtype):
        return OBSERVED
    refusal = _refusal(inputs, weights, gates, routing)
    if refusal is not None:
        return refusal
    found_layers = named(activation, len(weights))
    if found_layers is None:
        return _ODD
    layers, sloped = found_layers
    if sloped != (slopes is not None) or (sloped and not isinstance(slopes, _LISTS)):
        return _ODD
    if on_gpu:
        replayed = _on_gpu(inputs, weights, biases, gates, routing, layers) if plain else None
        return "no call like it was recorded" if replayed is None else replayed
    epsilons: Any = None
    if sloped:
        epsilons = [dice_eps] * len(layers) if isinstance(dice_eps, float) else dice_eps
    stored = layerwise.stored(layers, norms, rates, epsilons)
    if isinstance(stored, str):
        return stored
    if gates[1] is not None and (stored is not None or sloped):
        apart = several and len(inputs) > 1
        logits = _logits(inputs if apart else [first] * routing.num_gates, apart and casting, gates, routing)
        if logits is None:
            return _LOGITS
        gates = logits, None, None, None
    if stored is not None:
        own = spec_of(routing.wiring, len(inputs) if several else 1, stored.layers, False)
        return layerwise.direct(own, inputs, weights, biases, gates[0], stored.norms, slopes) or _ODD
    running = parts_of_norms(norms, gates[3], routing, first.dtype)
    if NotImplemented in running:
        return "norms are not plain batch norms by running statistics, of one eps and dtype within a layer"
    spec = spec_of(routing.wiring, len(inputs) if several else 1, layers, gates[1] is not None)
    way = spec.encoded[0], not spec.unread, _backends.forced() is not None
    found: tuple[Tensor, ...] | None = _extension.function("level")(
        inputs, weights, biases, *gates[:3], *running, slopes, epsilons, *way
    )
    if found is None:
        return _ODD
    if keeps is not None:
        lists.kept_lists().keep(not several, *keeps, spec.encoded[0])
    return found


def _logits(
    streams: Sequence[Tensor], apart: bool, gates: tuple[Any, Any, Any, Any], routing: Routing
) -> list[Tensor] | Tensor | None:
    """Those of linear gates, each of its stream, or in one tensor; None for gates with norms, and all that do not fit.

    Gates in one matrix are one product where they read one stream, as do those in several, but if ``apart``: under
    autocast one that nobody reads would get a gradient of zeros.
    """
    _, weights, biases, norms = gates
    sizes = routing.wiring.gate_sizes
    one = not apart and all(x is streams[0] for x in streams)
    if isinstance(weights, Tensor):
        joined = sum(sizes)
        plain = norms is None and isinstance(streams[0], Tensor) and streams[0].dim() == 2
        if not plain or not _is_linear(streams[0], weights, biases, joined):
            return None
        if one:
            return F.linear(streams[0], weights, biases)
        weights = weights.split(sizes)
        biases = None if biases is None else biases.split(sizes)
    biases = [None] * len(sizes) if biases is None else biases
    if norms is not None or not all(isinstance(own, _LISTS) and len(own) == len(sizes) for own in (weights, biases)):
        return None
    fit = all(
        isinstance(x, Tensor) and x.dim() == 2 and _is_linear(x, weight, bias, size)
        for x, weight, bias, size in zip(streams, weights, biases, sizes, strict=False)
    )
    if not fit:
        return None
    if not torch.is_grad_enabled():
        return list(map(F.linear, streams, weights, biases))
    return gate_logits(streams[:1] if one else streams, weights, biases)


def _is_linear(x: Tensor, weight: Any, bias: Any, size: int) -> bool:
    """Whether these are a linear layer of the input with so many outputs; without a bias that is None."""
    return _fits(weight, (size, x.shape[1]), x) and (bias is None or _fits(bias, (size,), x))


def _fits(tensor: Any, shape: tuple[int, ...], like: Tensor) -> bool:
    plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
    if not plain:
        return False
    same = tensor.dtype is like.dtype or (casts_in_cpp() and torch.float64 not in (tensor.dtype, like.dtype))
    return same and tensor.device == like.device and tensor.shape == shape


def _rates(dropout: Any, weights: Any) -> tuple[float, ...] | None:
    """Those of dropout, one a layer, or none where nothing is dropped; None where they are not such."""
    if type(dropout) in _NUMBERS and dropout == 0:
        return ()
    if not isinstance(weights, _LISTS):
        return None
    rates = tuple(dropout) if isinstance(dropout, _LISTS) else (dropout,) * len(weights)
    if len(rates) != len(weights) or not all(type(rate) in _NUMBERS and 0 <= rate <= 1 for rate in rates):
        return None
    return tuple(map(float, rates)) if any(rates) else ()


def _refusal(inputs: Any, weights: Any, gates: tuple[Any, Any, Any, Any], routing: Any) -> str | None:
    """Why arguments do not fit each other, as far as their numbers tell."""
    if type(routing) is not Routing or not (isinstance(weights, _LISTS) and weights):
        return _ODD
    if routing.wiring.idle:
        return "an expert is not mixed by any gate"
    several = isinstance(inputs, _LISTS)
    if several and len(inputs) != routing.num_inputs:
        return _ODD
    if several and gates[1] is not None and 1 < len(inputs) < routing.num_gates:
        return _ODD
    return _ODD if (gates[1] is None if gates[0] is None else gates[1:] != (None, None, None)) else None


def _are_eps(dice_eps: Any, weights: Any) -> bool:
    """Whether it is a positive number a layer."""
    if not (isinstance(dice_eps, _LISTS) and isinstance(weights, _LISTS) and len(dice_eps) == len(weights)):
        return False
    return all(isinstance(eps, float) and 0.0 < eps < math.inf for eps in dice_eps)


def note_direct(inputs: Any) -> None:
    """Logs a call that went the direct way."""
    x = inputs if isinstance(inputs, Tensor) else inputs[0]
    if x.is_cpu and _backends.forced() != "triton":
        name, reason = "cpp", "nothing stands in the way of the direct call of C++"
    else:
        name, reason = "triton", "a call like it was recorded, and is replayed"
    _decisions.note("expert_mixture", name, reason, x, x.shape[0], "forward")


def named(activation: Any, count: int) -> tuple[tuple[Layer, ...], bool] | None:
    """The layers by the names of their activations, and whether any has slopes."""
    if isinstance(activation, str):
        return _alike(activation, count)
    if not isinstance(activation, _LISTS) or len(activation) != count:
        return None
    if not all(isinstance(name, str) and name in _LAYERS for name in activation):
        return None
    return tuple([_LAYERS[name] for name in activation]), any(has_slopes(CODES[name]) for name in activation)


@functools.lru_cache(64)
def _alike(activation: str, count: int) -> tuple[tuple[Layer, ...], bool] | None:
    return named((activation,) * count, count)


def _on_gpu(
    inputs: Any,
    weights: Any,
    biases: Any,
    gates: tuple[Any, Any, Any, Any],
    routing: Routing,
    layers: tuple[Layer, ...],
) -> tuple[Tensor, ...] | None:
    """By what was recorded of a call like this one, None where nothing was."""
    count = len(inputs) if isinstance(inputs, _LISTS) else 1
    spec = spec_of(routing.wiring, count, layers, gates[1] is not None).shared
    if spec.unread or gates[3] is not None:
        return None
    found = _extension.function("level_tensors")(inputs, weights, biases, *gates[:3], spec.words)
    if found is None:
        return None
    tensors, wanted, signature = found
    launcher = _backends.triton_module("level")
    results = launcher.replay_forward(spec, tensors, wanted, signature)
    if results is None:
        return None
    if not wanted:
        return tuple(results.list())
    with_node = _extension.function("recorded_level")
    return tuple(with_node(tensors, results, spec.words, _backends.forced() is not None))


def parts_of_norms(norms: Any, gate_norms: Any, routing: Routing, dtype: torch.dtype) -> tuple[Any, Any]:
    """What C++ takes of batch norms by running statistics, experts' by layer and gates', beside inputs of ``dtype``.

    NotImplemented for others, and for some that do not go together, so that the checks in Python say why; C++ checks
    numbers of experts and layers, shapes and devices itself.
    """
    by_layer = None if norms is None else _of_layers(norms, dtype)
    return by_layer, None if gate_norms is None else _of_gates(gate_norms, routing, dtype)


def _of_layers(norms: Any, dtype: torch.dtype) -> Any:
    """The parts by layer, None for a layer without norms."""
    if not isinstance(norms, layerwise.LISTS_OF_MODULES):
        return NotImplemented
    own: list[Any] = [layer for layer in norms if layer is not None]
    layers = [None if layer is None else _of_layer(layer, dtype) for layer in norms]
    if any([layer is NotImplemented for layer in layers]) or len(set().union(*own)) != sum(map(len, own)):
        return NotImplemented
    return layers


def _of_layer(norms: Any, dtype: torch.dtype) -> Any:
    """The parts of a layer's norms, all of one eps."""
    if not isinstance(norms, layerwise.LISTS_OF_MODULES) or not norms:
        return NotImplemented
    modules: list[Any] = list(norms)
    parts: list[Any] = list(map(running_parts, modules))
    return NotImplemented if None in parts or not _are_whole(modules, parts, dtype) else parts


def _of_gates(norms: Any, routing: Routing, dtype: torch.dtype) -> Any:
    """The parts of the gates' norms, of which any may be None."""
    if not isinstance(norms, layerwise.LISTS_OF_MODULES) or len(norms) != routing.num_gates:
        return NotImplemented
    parts = [None if norm is None else running_parts(norm) or NotImplemented for norm in norms]
    modules: Any = norms
    for norm, own in zip(modules, parts, strict=True):
        if own is NotImplemented or (own is not None and not _are_whole([norm], [own], dtype)):
            return NotImplemented
    return parts


def _are_whole(norms: list[Any], parts: list[Any], dtype: torch.dtype) -> bool:
    """Whether ``check_module`` takes the norms, of one width and eps, beside inputs of ``dtype``; C++ asks for more."""
    width, eps = norms[0].num_features, norms[0].eps
    for norm, (mean, variance, weight, bias, own_eps) in zip(norms, parts, strict=True):
        if own_eps != eps or norm.num_features != width:
            return False
        same = mean.dtype is dtype and variance.dtype is dtype and weight is not None and weight.dtype is dtype
        same = same and bias is not None and bias.dtype is dtype
        if not same and not _go_with(dtype, (mean, variance, weight, bias)):
            return False
    return type(eps) in (float, int) and eps >= 0 and parts[0][0].shape == (width,)


def _go_with(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> bool:
    """Whether a norm's tensors may lie beside inputs of ``dtype``, as ``check_parameter`` has it."""
    others = {tensor.dtype for tensor in tensors if tensor is not None} - {dtype}
    return not others or (others == {torch.float32} and dtype in (torch.bfloat16, torch.float16))
