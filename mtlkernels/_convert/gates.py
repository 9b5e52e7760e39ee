"""Gates: their logits in every mode, and one product for those that read one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain, flatten, read_chain
from mtlkernels._convert.folding import may_cache
from mtlkernels._convert.mlp import Layer, Rows, activate, drops, folds, odd_weight, parameters
from mtlkernels.nn.level import linear_parameters
from mtlkernels.ops._linears import joint_linear

# Measured with gates of (64,) and without hidden layers, on 416 features: on fewer rows than this, putting the gates'
# weights together takes longer than one product saves.
JOINT_ROWS = 1024


class Gate(NamedTuple):
    """``dropout(softmax(logits))``.

    ``layers`` are those up to the logits, the last one's result; None where ``modules`` have to be called instead.
    """

    layers: list[Layer] | None
    modules: Sequence[Any]
    dropout: Any

    @property
    def size(self) -> int:
        """How many logits a gate of known layers has."""
        return 0 if self.layers is None else len(self.layers[-1].linear.weight)


def read_gate(chain: Chain) -> Gate | str:
    """A gate from a chain that ends with its logits, or with their softmax and perhaps a dropout; or what it has."""
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
    layers = read_chain(modules)
    if not isinstance(layers, str):
        layers = odd_weight(layers) or layers
    return Gate(None if isinstance(layers, str) else layers, modules, dropout)


def linear_gates(gates: Sequence[Gate], rows: Rows) -> Any:
    """Weights and biases of gates that are one linear layer each now; None where one is more."""
    cache = may_cache()
    pairs = []
    for gate in gates:
        if gate.layers is None or len(gate.layers) != 1:
            return None
        (layer,) = gate.layers
        if layer.activation != "none" or drops(layer.dropout) or not folds(layer, rows):
            return None
        pairs.append(parameters(layer, cache))
    return zip(*pairs, strict=True)


def logits_of(gates: Sequence[Gate], inputs: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """Each gate's logits, from its own input."""
    cache = may_cache()
    first: list[Any] = [None] * len(gates)
    for members in _sharing(gates, inputs):
        pairs = [_product(gates[k].layers[0], rows, cache) for k in members]  # type: ignore[index]
        weights, biases = [w for w, _ in pairs], [b for _, b in pairs if b is not None]
        x = inputs[members[0]]
        if len(members) == 1 or len(biases) not in (0, len(pairs)):
            products = [F.linear(x, *pair) for pair in pairs]
        else:
            products = joint_linear(x, weights, biases)
        for k, z in zip(members, products, strict=True):
            first[k] = z
    return [_rest(gate, x, z, rows, cache) for gate, x, z in zip(gates, inputs, first, strict=True)]


def _sharing(gates: Sequence[Gate], inputs: Sequence[Tensor]) -> list[list[int]]:
    """The gates with known layers, those together that read one tensor of many rows."""
    known = [k for k, gate in enumerate(gates) if gate.layers is not None]
    if torch.compiler.is_compiling() or inputs[0].shape[0] < JOINT_ROWS:
        return [[k] for k in known]
    found: dict[int, list[int]] = {}
    for k in known:
        found.setdefault(id(inputs[k]), []).append(k)
    return list(found.values())


def _product(layer: Layer, rows: Rows, cache: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer's product, with its batch norm in them where that can be folded."""
    return parameters(layer, cache) if folds(layer, rows) else linear_parameters(layer.linear)


def _rest(gate: Gate, x: Tensor, z: Tensor | None, rows: Rows, cache: bool) -> Tensor:
    """The logits from the first layer's product, or by modules where layers are not known."""
    if gate.layers is None or z is None:
        for module in gate.modules:
            x = module(x)
        return x
    for i, layer in enumerate(gate.layers):
        x = F.linear(x, *_product(layer, rows, cache)) if i else z
        if not folds(layer, rows):
            x = layer.norm(x)
        x = activate(layer, x)
        if drops(layer.dropout):
            x = F.dropout(x, layer.dropout.p)
    return x
