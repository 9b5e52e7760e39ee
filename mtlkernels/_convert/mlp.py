"""Layers of existing models, and what they are now: in training, in evaluation, with batch norm folded into them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels._convert.folding import wants_gradient
from mtlkernels._convert.products import Product, function_name
from mtlkernels.nn.level import linear_parameters, plain
from mtlkernels.ops import activations as act
from mtlkernels.ops._folding import FOLD_ROWS

ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.Identity: "none",
}


# torch-rechub's, whose gate has statistics of each row; deepctr-torch's fails in its experts, before and after.
_DICE = "torch_rechub.basic.activation.Dice"

# Of torch-rechub's and deepctr-torch's PLE: on fewer rows than this, training with batch norm is as fast by modules.
NORM_ROWS = 16

_Parameter = nn.Parameter  # attribute look-ups show when one row is served


class Layer(NamedTuple):
    """``dropout(activation(norm(linear(x))))``; ``sloped`` is the activation's module where it has learned slopes."""

    linear: Any
    norm: Any
    activation: str
    dropout: Any
    sloped: Any = None


def activation_name(module: Any) -> str | None:
    """The operators' name of an activation, None where they have none."""
    if not issubclass(type(module), nn.Module):
        return function_name(module)
    name = ACTIVATIONS.get(type(module))
    if name is not None:
        return name
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    if type(module) is nn.LeakyReLU and module.negative_slope == act.LEAKY_SLOPE:
        return "leaky_relu"
    if type(module) is nn.PReLU:
        return "prelu"
    kind = type(module)
    return "dice" if f"{kind.__module__}.{kind.__qualname__}" == _DICE and module.epsilon > 0 else None


def name_of(step: Any) -> str:
    """What a reason calls a module or a function: its class, or its own name."""
    return type(step).__name__ if isinstance(step, nn.Module) else getattr(step, "__name__", type(step).__name__)


def setting_of(module: Any) -> str:
    """A module's class and what of its settings keeps it from being fused, in the report's words."""
    kind = type(module)
    if not isinstance(module, nn.Module):
        return name_of(module)
    if kind is nn.LeakyReLU:
        return f"LeakyReLU with slope {module.negative_slope:g}"
    if kind is nn.GELU:
        return f"GELU with approximate={module.approximate!r}"
    if kind.__name__ == "Dice":
        if any(isinstance(part, nn.BatchNorm1d) for part in module.children()):
            return "Dice over the batch"
        return f"Dice with epsilon {module.epsilon:g}" if f"{kind.__module__}.Dice" == _DICE else "Dice"
    if kind.__module__ == nn.ReLU.__module__ and kind is not nn.Softmax and module.extra_repr():
        return f"{kind.__name__} with {module.extra_repr()}"
    return kind.__name__


def odd_weight(layers: Sequence[Layer]) -> str | None:
    """A weight of a kind that its own module has to multiply with, None where all are plain."""
    for layer in layers:
        weight = layer.linear._parameters.get("weight")
        if type(weight) is not _Parameter and not plain(weight := linear_parameters(layer.linear)[0]):
            return f"a weight of class {type(weight).__name__}"
    return None


def slopes_refusal(linear: Any, module: Any) -> str | None:
    """Why slopes after a linear layer cannot be fused: PReLU's may be of another width, which fails when called."""
    width = len(linear_parameters(linear)[0])
    slopes = module.weight if type(module) is nn.PReLU else module.alpha
    return None if slopes.numel() in (1, width) else f"{type(module).__name__} of {slopes.numel()} slopes after {width}"


def slopes_of(layer: Layer) -> Tensor:
    """The slopes of a layer's activation, which has some."""
    found: Tensor = layer.sloped.weight if layer.activation == "prelu" else layer.sloped.alpha
    return found


def activate(layer: Layer, x: Tensor) -> Tensor:
    """A layer's activation by itself."""
    found: Tensor = act.activate(act.CODES[layer.activation], x) if layer.sloped is None else layer.sloped(x)
    return found


class Rows(NamedTuple):
    """What the number of rows of a call allows.

    ``fold``: folding batch norm also where gradients flow through what is folded, which autograd follows: work in
    proportion to the weights. ``normalize``: norms and dropout in the fused operator; the statistics of one row are an
    error, which the modules raise. ``turn``: weights that lie across, as ``x @ matrix`` has them; kernels read them
    along, so that each call copies them.
    """

    fold: bool
    normalize: bool
    turn: bool = True


_any_size = False


@contextlib.contextmanager
def at_any_size() -> Iterator[None]:
    """Fused evaluation on however few rows: for trials, which want to see it. Other threads get right numbers too."""
    global _any_size
    before, _any_size = _any_size, True
    try:
        yield
    finally:
        _any_size = before


def in_trial() -> bool:
    """Whether :func:`at_any_size` is at work."""
    return _any_size


def rows_of(x: Tensor) -> Rows:
    """Of a call with such a tensor."""
    if _any_size or torch.compiler.is_compiling():
        return Rows(True, True)
    rows = x.shape[0]
    many = rows >= FOLD_ROWS
    return Rows(many or not torch.is_grad_enabled(), rows >= NORM_ROWS, many)


def running(norm: Any) -> bool:
    """Whether a norm is a batch norm by running statistics now, as PyTorch decides it."""
    return type(norm) is nn.BatchNorm1d and not norm.training and norm._buffers.get("running_mean") is not None


def folds(layer: Layer, rows: Rows) -> bool:
    """Whether a layer is one linear layer now, its batch norm folded into it if it has any."""
    norm = layer.norm
    return norm is None or (running(norm) and (rows.fold or not wants_gradient(layer.linear, norm)))


def drops(dropout: Any) -> bool:
    """Whether a dropout, or None, drops anything now."""
    return dropout is not None and dropout.p > 0 and dropout.training


def kind_of(layers: Sequence[Layer]) -> tuple[Any, ...] | None:
    """What experts must have in common to be evaluated together.

    None where a weight is of a kind that its own module has to multiply with, such as a quantized one.
    """
    found: list[Any] = []
    for layer in layers:
        norm = layer.norm
        weight, bias = linear_parameters(layer.linear)
        if type(weight) is not _Parameter and not plain(weight):
            return None
        own = None if norm is None else (type(norm), norm.eps, running(norm))
        rate = layer.dropout.p if drops(layer.dropout) else 0.0
        found.append((weight.shape, bias is None, layer.activation, _dice_eps(layer), own, rate))
    return tuple(found)


def _dice_eps(layer: Layer) -> float:
    """That of the activation; of another one, what the operator does not read."""
    return float(layer.sloped.epsilon) if layer.activation == "dice" else 1.0


def fusible(layers: Sequence[Layer], rows: Rows) -> bool:
    """Whether the fused operators evaluate an expert now."""
    for layer in layers:
        plain = folds(layer, rows)
        if not rows.turn and type(layer.linear) is Product and layer.linear.lies_across:
            return False
        if not plain and (running(layer.norm) or not rows.normalize):
            return False
        if drops(layer.dropout) and not rows.normalize:
            return False
    return True


class Experts(NamedTuple):
    """What ``expert_mixture`` takes: weights and biases by layer, then expert, and its keyword arguments."""

    weights: Sequence[Sequence[Tensor]]
    biases: Sequence[Sequence[Tensor] | None]
    options: dict[str, Any]


def join(experts: Sequence[Sequence[Layer]]) -> Experts:
    """Experts of one kind."""
    weights: list[Sequence[Tensor]] = []
    biases: list[Any] = []
    norms: list[Any] = []
    for layers in zip(*experts, strict=True):
        pairs = [linear_parameters(layer.linear) for layer in layers]
        weights.append([weight for weight, _ in pairs])
        biases.append(None if pairs[0][1] is None else [bias for _, bias in pairs])
        norms.append(None if layers[0].norm is None else [layer.norm for layer in layers])
    names = [layer.activation for layer in experts[0]]
    options: dict[str, Any] = {"activation": names[0] if len(set(names)) == 1 else names}
    rates = [layer.dropout.p if drops(layer.dropout) else 0.0 for layer in experts[0]]
    if any(rates):
        options["dropout"] = rates
    if any(norm is not None for norm in norms):
        options["norms"] = norms
    slopes = [
        None if layers[0].sloped is None else list(map(slopes_of, layers)) for layers in zip(*experts, strict=True)
    ]
    if any(entry is not None for entry in slopes):
        options |= {"slopes": slopes, "dice_eps": [_dice_eps(layer) for layer in experts[0]]}
    return Experts(weights, biases, options)
