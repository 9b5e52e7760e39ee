"""Gates: their logits in every mode, and one product for those that read one stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.chains import Chain, Product, flatten, read_chain, run_chain
from mtlkernels.ops import activations as act
from mtlkernels.ops._fusing import Layer, Rows, drop_rate, folds, weight_refusal
from mtlkernels.ops._linears import joint_linear

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)
# Measured with gates of (64,) and without hidden layers, on 416 features: on fewer rows than this, putting the gates'
# weights together takes longer than one product saves.
JOINT_ROWS = 1024


class Gate(NamedTuple):
    """``dropout(softmax(logits))``.

    ``layers`` are those up to the logits, the last one's result; None where ``modules`` have to be called instead, and
    none at all for equal shares. ``softmax``: it was read with one of its own behind the logits.
    """

    layers: list[Layer] | None
    modules: Sequence[Any]
    dropout: Any
    softmax: bool = False


EQUAL = Gate([], (), None)


def size_of(gate: Gate) -> int | None:
    """How many logits a gate has, None where that is not known or as many as there are experts.

    No property: torch 2.10 compiles none of a NamedTuple.
    """
    return len(gate.layers[-1].weight) if gate.layers else None


def has_softmax(gate: Gate | str) -> bool:
    """Whether a gate has a softmax of its own."""
    return not isinstance(gate, str) and gate.softmax


def has_equal_shares(gate: Gate | str) -> bool:
    """Whether a gate is :data:`EQUAL`: torch 2.10 does not compile ``is`` of a NamedTuple."""
    return not isinstance(gate, str) and gate.layers is not None and len(gate.layers) == 0


def read_gate(chain: Chain) -> Gate | str:
    """A gate from a chain that ends with its logits, or with their softmax and perhaps a dropout; or what it has.

    None stands for a gate without logits: equal shares, so that one expert alone is given as it is.
    """
    if chain is None:
        return EQUAL
    called = flatten(chain)
    modules = _torch.all_unproxied(called)
    dropout, softmax = None, False
    behind = 1 if len(modules) > 1 and type(modules[-1]) is nn.Dropout else 0
    last = modules[-1 - behind] if modules else None
    if type(last) is nn.Softmax and last.dim in (1, -1):
        dropout, softmax = modules[-1] if behind else None, True
        modules, called = modules[: -1 - behind], called[: -1 - behind]
    if not modules:
        return "a gate without layers"
    if any(type(module) is nn.Softmax for module in modules):
        return "Softmax"
    if any(module in _SOFTMAX for module in modules if not isinstance(module, (nn.Module, Product))):
        return "a function softmax, which is left out of a gate that ends with its logits"
    layers = read_chain(modules)
    if not isinstance(layers, str):
        layers = weight_refusal(layers) or layers
    return Gate(None if isinstance(layers, str) else layers, called, dropout, softmax)


def linear_gates(gates: Sequence[Gate], rows: Rows) -> dict[str, Any] | None:
    """What ``expert_mixture`` takes of gates that are one linear layer each now; None where one is more."""
    layers: list[Layer] = []
    for gate in gates:
        if gate.layers is None or len(gate.layers) != 1:
            return None
        (layer,) = gate.layers
        if layer.activation != "none" or drop_rate(layer.dropout) > 0 or not folds(layer, rows):
            return None
        layers.append(layer)
    norms = [layer.norm for layer in layers]
    return {
        "gate_weights": [layer.weight for layer in layers],
        "gate_biases": [layer.bias for layer in layers],
        "gate_norms": norms if any(norm is not None for norm in norms) else None,
    }


def logits_of(gates: Sequence[Gate], inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Each gate's logits, from its own input; ``sizes`` tells how many experts each one sees."""
    products: dict[int, Tensor] = {}
    for members in _sharing(gates, inputs):
        layers = [gates[k].layers[0] for k in members]  # type: ignore[index]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        x = inputs[members[0]]
        if len(members) == 1 or len(biases) not in (0, len(layers)):
            joint: Sequence[Tensor] = [F.linear(x, layer.weight, layer.bias) for layer in layers]
        else:
            joint = joint_linear(x, [layer.weight for layer in layers], biases)
        products |= zip(members, joint, strict=True)
    zeros: dict[int, Tensor] = {}
    logits = []
    for k, (gate, x, size) in enumerate(zip(gates, inputs, sizes, strict=True)):
        if gate.layers is None:
            logits.append(run_chain(gate.modules, x))
        elif gate.layers:
            for i, layer in enumerate(gate.layers):
                x = _finish(layer, F.linear(x, layer.weight, layer.bias) if i else products[k])
            logits.append(x)
        else:
            zeros[size] = zeros[size] if size in zeros else x.new_zeros(x.shape[0], size)
            logits.append(zeros[size])
    dtypes = {x.dtype for x in logits}
    if len(dtypes) == 1:
        return logits
    widest = functools.reduce(torch.promote_types, dtypes)  # of those that autocast has made, and those that it has not
    return [x.to(widest) for x in logits]


def _sharing(gates: Sequence[Gate], inputs: Sequence[Tensor]) -> list[list[int]]:
    """The gates with known layers, those together that read one tensor of many rows."""
    known = [k for k, gate in enumerate(gates) if gate.layers]
    if _torch.compiling() or inputs[0].shape[0] < JOINT_ROWS:
        return [[k] for k in known]
    readers: dict[int, list[int]] = {}
    for k in known:
        readers.setdefault(id(inputs[k]), []).append(k)
    return list(readers.values())


def _finish(layer: Layer, x: Tensor) -> Tensor:
    """What a layer makes of its product."""
    if layer.norm is not None:
        x = layer.norm(x)
    x = act.activate(act.CODES[layer.activation], x) if layer.sloped is None else layer.sloped(x)
    rate = drop_rate(layer.dropout)
    return F.dropout(x, rate) if rate > 0 else x
