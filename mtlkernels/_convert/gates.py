"""Gates: their logits in every mode, and one product for those that read one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain, flatten, read_chain
from mtlkernels._convert.mlp import Layer, Rows, activate, drops, folds, odd_weight
from mtlkernels._convert.products import Product
from mtlkernels.nn.level import linear_parameters
from mtlkernels.ops._linears import joint_linear

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)
# Measured with gates of (64,) and without hidden layers, on 416 features: on fewer rows than this, putting the gates'
# weights together takes longer than one product saves.
JOINT_ROWS = 1024


class Gate(NamedTuple):
    """``dropout(softmax(logits))``.

    ``layers`` are those up to the logits, the last one's result; None where ``modules`` have to be called instead, and
    none at all for equal shares.
    """

    layers: list[Layer] | None
    modules: Sequence[Any]
    dropout: Any

    @property
    def size(self) -> int | None:
        """How many logits a gate has, None where that is not known or as many as there are experts."""
        return len(self.layers[-1].linear.weight) if self.layers else None


EQUAL = Gate([], (), None)


def has_equal_shares(gate: Gate | str) -> bool:
    """Whether a gate is :data:`EQUAL`: torch 2.10 does not compile ``is`` of a NamedTuple."""
    return not isinstance(gate, str) and gate.layers is not None and len(gate.layers) == 0


def read_gate(chain: Chain) -> Gate | str:
    """A gate from a chain that ends with its logits, or with their softmax and perhaps a dropout; or what it has.

    None stands for a gate without logits: equal shares, so that one expert alone is given as it is.
    """
    if chain is None:
        return EQUAL
    modules = flatten(chain)
    dropout = None
    behind = 1 if len(modules) > 1 and type(modules[-1]) is nn.Dropout else 0
    last = modules[-1 - behind] if modules else None
    if type(last) is nn.Softmax and last.dim in (1, -1):
        dropout = modules[-1] if behind else None
        modules = modules[: -1 - behind]
    if not modules:
        return "a gate without layers"
    if any(type(module) is nn.Softmax for module in modules):
        return "Softmax"
    if any(module in _SOFTMAX for module in modules if not isinstance(module, (nn.Module, Product))):
        return "a function softmax, which is left out of a gate that ends with its logits"
    layers = read_chain(modules)
    if not isinstance(layers, str):
        layers = odd_weight(layers) or layers
    return Gate(None if isinstance(layers, str) else layers, modules, dropout)


def linear_gates(gates: Sequence[Gate], rows: Rows) -> dict[str, Any] | None:
    """What ``expert_mixture`` takes of gates that are one linear layer each now; None where one is more."""
    layers: list[Layer] = []
    for gate in gates:
        if gate.layers is None or len(gate.layers) != 1:
            return None
        (layer,) = gate.layers
        if layer.activation != "none" or drops(layer.dropout) or not folds(layer, rows):
            return None
        layers.append(layer)
    weights, biases = zip(*(linear_parameters(layer.linear) for layer in layers), strict=True)
    norms = [layer.norm for layer in layers]
    return {
        "gate_weights": weights,
        "gate_biases": biases,
        "gate_norms": norms if any(norm is not None for norm in norms) else None,
    }


def logits_of(gates: Sequence[Gate], inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Each gate's logits, from its own input; ``sizes`` tells how many experts each one sees."""
    first: list[Any] = [None] * len(gates)
    for members in _sharing(gates, inputs):
        pairs = [linear_parameters(gates[k].layers[0].linear) for k in members]  # type: ignore[index]
        weights, biases = [w for w, _ in pairs], [b for _, b in pairs if b is not None]
        x = inputs[members[0]]
        if len(members) == 1 or len(biases) not in (0, len(pairs)):
            products = [F.linear(x, *pair) for pair in pairs]
        else:
            products = joint_linear(x, weights, biases)
        for k, z in zip(members, products, strict=True):
            first[k] = z
    zeros: dict[int, Tensor] = {}
    for k, gate in enumerate(gates):
        if has_equal_shares(gate):
            size, x = sizes[k], inputs[k]
            first[k] = zeros[size] = zeros[size] if size in zeros else x.new_zeros(x.shape[0], size)
        else:
            first[k] = _rest(gate, inputs[k], first[k])
    return first


def _sharing(gates: Sequence[Gate], inputs: Sequence[Tensor]) -> list[list[int]]:
    """The gates with known layers, those together that read one tensor of many rows."""
    known = [k for k, gate in enumerate(gates) if gate.layers]
    if torch.compiler.is_compiling() or inputs[0].shape[0] < JOINT_ROWS:
        return [[k] for k in known]
    found: dict[int, list[int]] = {}
    for k in known:
        found.setdefault(id(inputs[k]), []).append(k)
    return list(found.values())


def _rest(gate: Gate, x: Tensor, z: Tensor | None) -> Tensor:
    """The logits from the first layer's product, or by modules where layers are not known."""
    if gate.layers is None or z is None:
        for module in gate.modules:
            x = module(x)
        return x
    for i, layer in enumerate(gate.layers):
        x = F.linear(x, *linear_parameters(layer.linear)) if i else z
        if layer.norm is not None:
            x = layer.norm(x)
        x = activate(layer, x)
        if drops(layer.dropout):
            x = F.dropout(x, layer.dropout.p)
    return x
