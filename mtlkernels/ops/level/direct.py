"""The way past checks and dispatcher, which would take as long as a small batch on a CPU, and longer on a GPU."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from mtlkernels import _backends, _decisions, _extension
from mtlkernels.ops._call import replays, unobserved
from mtlkernels.ops.activations import CODES, has_slopes
from mtlkernels.ops.level import lists
from mtlkernels.ops.level.call import spec_of
from mtlkernels.ops.level.norms import running_parts
from mtlkernels.ops.level.spec import Layer
from mtlkernels.routing import Routing

_LISTS = (list, tuple)
# Why a call is not for the direct way, where that is found out later, if anybody asks.
OBSERVED = "something looks on"
_ODD = "the arguments are not plain tensors of one dtype in lists, of shapes that fit"
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
    keeps = lists.known_by(weights, biases, gates, routing, activation) if norms is None and slopes is None else None
    if keeps is not None and first.is_cpu:
        kept = lists.kept_lists().serve(inputs, *keeps)
        if type(kept) is tuple:
            return kept
        keeps = None if kept is None else keeps
    on_gpu = not (first.is_cpu and unobserved())
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
        own = None if sloped or norms is not None else _on_gpu(inputs, weights, biases, gates, routing, layers)
        return "no call like it was recorded" if own is None else own
    epsilons = None
    if sloped:
        epsilons = [dice_eps] * len(layers) if isinstance(dice_eps, float) else dice_eps
        if not isinstance(epsilons, _LISTS) or not all(isinstance(eps, float) for eps in epsilons):
            return _ODD
    running, running_gates = parts_of_norms(norms, gates[3])
    if running is NotImplemented or running_gates is NotImplemented:
        return "a norm is not a plain batch norm by running statistics"
    spec = spec_of(routing.wiring, len(inputs) if several else 1, layers, gates[1] is not None and not sloped)
    way = spec.encoded[0], not spec.unread, _backends.forced() is not None
    found: tuple[Tensor, ...] | None = _extension.function("level")(
        inputs, weights, biases, *gates[:3], running, running_gates, slopes, epsilons, *way
    )
    if found is None:
        return _ODD
    if keeps is not None:
        lists.kept_lists().keep(not several, *keeps, spec.encoded[0])
    return found


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
    found = _extension.function("level_tensors")(inputs, weights, biases, *gates[:3], spec.encoded[0])
    if found is None or spec.unread or gates[3] is not None:
        return None
    tensors, wanted = found
    launcher = _backends.triton_module("level")
    recording = launcher.recorded(spec, tensors, wanted)
    if recording is None:
        return None
    results = recording.replay(launcher.moving(spec, tensors))
    if not wanted:
        return tuple(results.list())
    with_node = _extension.function("recorded_level")
    return tuple(with_node(tensors, results, spec.encoded[0], _backends.forced() is not None))


def parts_of_norms(norms: Any, gate_norms: Any) -> tuple[Any, Any]:
    """What C++ takes of batch norms by running statistics, experts' by layer and gates'; NotImplemented for others."""
    return None if norms is None else _running(norms), None if gate_norms is None else _parts(gate_norms)


def _parts(norms: Any) -> Any:
    """Of norms of which any may be None."""
    if not isinstance(norms, (*_LISTS, nn.ModuleList)):
        return NotImplemented
    parts = [None if norm is None else running_parts(norm) or NotImplemented for norm in norms]
    return NotImplemented if any(part is NotImplemented for part in parts) else parts


def _running(norms: Any) -> Any:
    """The same for each layer."""
    if not isinstance(norms, (*_LISTS, nn.ModuleList)):
        return NotImplemented
    layers = [None if layer is None else _parts(layer) for layer in norms]
    return NotImplemented if any(layer is NotImplemented for layer in layers) else layers
