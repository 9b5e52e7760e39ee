"""What of a model may be fused, and if not, why: the one place that decides, for ``mtlkernels.nn`` and ``convert``.

All is read anew at each call, so that weights are never stale, and so that whatever is done to modules later (their
mode, an exchanged layer, a hook) is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mtlkernels import _torch
from mtlkernels._dtensors import has_dtensor
from mtlkernels.ops._folding import uses_running

# Folding with gradients takes as long as not fusing on fewer rows than these: measured with experts of (256, 128) on
# 416 features, and with those of (64, 32) on 64, whose layers have fewer weights than SMALL.
FOLD_ROWS, SMALL_FOLD_ROWS = 128, 768
SMALL = 1 << 14
# The same of computed weights where gradients flow to what they are computed from; own code may be one product for all.
TURN_ROWS = 640

# Attribute look-ups show when one row is served.
_Linear, _Parameter = nn.Linear, nn.Parameter


# What ``expert_mixture`` takes: weights and biases by layer, then expert, and its keyword arguments.
Experts = tuple[list[list[Tensor]], list[Any], dict[str, Any]]


class Layer(NamedTuple):
    """``dropout(activation(norm(x weight^T + bias)))`` now.

    ``sloped`` is the activation's module where it has learned slopes.
    """

    weight: Tensor
    bias: Tensor | None
    norm: Any
    activation: str
    dropout: Any
    sloped: Any = None


class Rows(NamedTuple):
    """What the number of rows of a call allows.

    ``fold``: folding batch norm also where gradients flow through what is folded, or through the call; see
    :func:`may_fold`. ``fold_small``: the same of layers with few weights. ``normalize``: norms and dropout in the
    fused operator; the statistics of one row are an error, which the modules raise. ``turn``: weights that lie across,
    as ``x @ matrix`` has them, as kernels read them along, so that each call copies them; and weights that were
    computed, of which autograd records a node at each call. ``slopes``: PReLU's without a norm. ``constant``: nothing
    that the call depends on wants a gradient or is cast, so that C++ takes norms by running statistics as they are.
    """

    fold: bool = True
    fold_small: bool = True
    normalize: bool = True
    turn: bool = True
    slopes: bool = True
    constant: bool = True


def may_fold(x: Tensor, weights: int = SMALL) -> bool:
    """Whether folding batch norm in a way that gradients flow through takes no longer than what fusing saves.

    Autograd follows it then: some operators for each layer of each expert, there and back. ``weights`` of a layer.
    """
    least = FOLD_ROWS if weights >= SMALL else SMALL_FOLD_ROWS
    return _torch.compiling() or not torch.is_grad_enabled() or x.shape[0] >= least


def has_hooks(module: Any) -> bool:
    """Whether calling a module does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_gradient_hooks(module: Any) -> bool:
    """Whether a parameter of the module's own has a hook, on its gradient or behind the accumulation of that.

    Autograd would call it without a gradient where no loss reaches the parameter, as a fused operator's node leads to
    it all the same; where modules are called, it is not called then.
    """
    return any(
        p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in module._parameters.values()
    )


def is_plain(weight: Any) -> bool:
    """Whether a weight is its numbers and nothing more, unlike a quantized or a distributed tensor."""
    return type(weight) in (_Parameter, Tensor) or isinstance(weight, _torch.TRACED)


def linear_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an ``nn.Linear``, or of what has them like one.

    Look-ups by ``nn.Module.__getattr__`` show. A replica of ``nn.DataParallel`` keeps its weights elsewhere, and
    so goes the long way.
    """
    parameters = layer._parameters
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters:  # which may also be a buffer, or a plain attribute
        return layer.weight, layer.bias
    return weight, parameters["bias"]


def plain_parameters(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that is ``F.linear`` by plain tensors, None for any other.

    Layers may have been exchanged, as LoRA and dynamic quantization do it, or have got weights of another kind.
    """
    parameters = layer._parameters
    weight = parameters.get("weight")
    if type(layer) is _Linear and type(weight) is _Parameter and "bias" in parameters:
        return weight, parameters["bias"]
    if refuses(layer):
        return None
    weight, bias = linear_parameters(layer)
    return (weight, bias) if is_plain(weight) else None


def refuses(layer: Any) -> bool:
    """Whether :func:`plain_parameters` has None for a layer, as far as that shows before a weight is computed."""
    parameters = layer._parameters
    weight = parameters.get("weight")
    if type(layer) is not nn.Linear and not parametrize.is_parametrized(layer):
        return True
    made = weight is None or "bias" not in parameters
    if type(layer).forward is not nn.Linear.forward or (made and has_hooks(layer)):
        return True  # a hook that makes the weight or the bias, as those of nn.utils.weight_norm and nn.utils.prune
    return weight is not None and not is_plain(weight)


def gate_weight(gate: Any) -> Tensor | None:
    """The weight of a gate that is one linear layer without a bias, to which nobody listens; None for any other."""
    pair = plain_parameters(gate) if isinstance(gate, _Linear) and not has_hooks(gate) else None
    return None if pair is None or pair[1] is not None else pair[0]


def weight_refusal(layers: Sequence[Layer]) -> str | None:
    """A weight of a kind that its own module has to multiply with, None where all are plain."""
    odd = next((layer.weight for layer in layers if not is_plain(layer.weight)), None)
    if odd is None:
        return None
    return f"a weight of class {type(odd).__name__}{', to be converted before it is sharded' * has_dtensor((odd,))}"


def norm_refusal(weight: Tensor, norm: Any) -> str | None:
    """Why a norm after a linear layer cannot be fused in any mode."""
    shape = (norm.num_features,) if type(norm) is nn.BatchNorm1d else norm.normalized_shape
    if tuple(shape) != weight.shape[:1]:
        return f"{type(norm).__name__} of {list(shape)} features after a layer of {weight.shape[0]}"
    return None


def slopes_refusal(weight: Tensor, sloped: Any) -> str | None:
    """Why slopes after a linear layer cannot be fused: PReLU's may be of another width, which fails when called."""
    count, width = slopes_of(sloped).numel(), len(weight)
    return None if count in (1, width) else f"{type(sloped).__name__} of {count} slopes after {width}"


def slopes_of(sloped: Any) -> Tensor:
    """The slopes of an activation's module, which has some."""
    slopes: Tensor = sloped.weight if type(sloped) is nn.PReLU else sloped.alpha
    return slopes


def drop_rate(dropout: Any) -> float:
    """The rate at which a dropout, or None, drops now."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def wants_gradient(weight: Tensor, bias: Tensor | None, norm: Any) -> bool:
    """Whether a tensor that would be folded requires a gradient."""
    return any(t is not None and t.requires_grad for t in (weight, bias, norm.weight, norm.bias))


def folds(layer: Layer, rows: Rows) -> bool:
    """Whether a layer is one linear layer now, its batch norm folded into it if it has any."""
    norm = layer.norm
    if norm is None:
        return True
    constant = rows.constant and not wants_gradient(layer.weight, layer.bias, norm)
    fold = rows.fold if layer.weight.numel() >= SMALL else rows.fold_small
    return uses_running(norm) and (fold or constant)


def kind_of_norm(norm: Any) -> tuple[Any, ...] | None:
    """What the norms of a layer must have in common: class, eps, source of statistics. None if it cannot be fused."""
    kind = type(norm)
    if (kind is not nn.BatchNorm1d and kind is not nn.LayerNorm) or "forward" in norm.__dict__:
        return None
    if kind is nn.BatchNorm1d and "running_mean" not in norm._buffers:  # but a parameter, say, that has taken its name
        return None
    if ("weight" not in norm._parameters or "bias" not in norm._parameters) and has_hooks(norm):
        return None  # a hook that makes one of them, as that of nn.utils.prune
    return kind, norm.eps, uses_running(norm)


def kind_of(layers: Sequence[Layer], rows: Rows = Rows()) -> tuple[Any, ...] | None:  # noqa: B008 (immutable)
    """What experts must have in common to be fused with one another, None where an expert's modules have to be called.

    These are called for a weight of a kind that its own module has to multiply with, and where fusing does not pay.
    """
    kind: list[Any] = []
    for layer in layers:
        weight, bias, norm, activation, dropout, sloped = layer
        if type(weight) is not _Parameter and not (
            is_plain(weight) and (rows.turn or (_lies_along(weight) and weight.is_leaf))
        ):
            return None
        if activation == "prelu" and norm is None and not rows.slopes:
            return None
        rate = drop_rate(dropout)
        if not rows.normalize and rate > 0:
            return None
        of_norm = None if norm is None else kind_of_norm(norm)
        if of_norm is not None and not (folds(layer, rows) if of_norm[2] else rows.normalize):
            return None
        eps = sloped.epsilon if activation == "dice" else None
        kind.append((weight.shape, bias is None, activation, eps, of_norm, rate))
    return tuple(kind)


def _lies_along(weight: Tensor) -> bool:
    """Whether kernels, which read a weight along its rows, need not copy it first."""
    return weight.stride(1) == 1 or weight.shape[1] <= 1


def common(kinds: Sequence[Any]) -> Any:
    """What all of some kinds are, so that their owners can be fused; None where they differ or one cannot be."""
    first = kinds[0]
    return first if all(kind == first for kind in kinds) else None  # torch.compile cannot count tuples


def join(experts: Sequence[Sequence[Layer]]) -> Experts:
    """Experts of one kind."""
    columns = list(zip(*experts, strict=True))
    weights = [[layer.weight for layer in column] for column in columns]
    biases = [None if column[0].bias is None else [layer.bias for layer in column] for column in columns]
    names = [layer.activation for layer in experts[0]]
    options: dict[str, Any] = {"activation": names[0] if len(set(names)) == 1 else names}
    rates = [drop_rate(layer.dropout) for layer in experts[0]]
    if any(rates):
        options["dropout"] = rates
    if any(layer.norm is not None for layer in experts[0]):
        options["norms"] = [None if column[0].norm is None else [layer.norm for layer in column] for column in columns]
    if any(layer.sloped is not None for layer in experts[0]):
        options["slopes"] = [
            None if column[0].sloped is None else [slopes_of(layer.sloped) for layer in column] for column in columns
        ]
        # Of other activations the operator does not read it.
        options["dice_eps"] = [layer.sloped.epsilon if layer.activation == "dice" else 1.0 for layer in experts[0]]
    return weights, biases, options
