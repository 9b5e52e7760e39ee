"""Linear layers of one input as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels import _torch, _tracing
from mtlkernels._backends import autocast_enabled
from mtlkernels._library import cast_floats
from mtlkernels.ops._call import held_leaves
from mtlkernels.ops._operands import check_memory_of_all

# Measured on a Xeon, one thread, 2 to 8 gates of 12 on 416 features, there and back: on fewer rows each by itself takes
# less than a Function in Python.
_JOINT_ROWS = 256


def joint_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """``F.linear(x, w, b)`` for each pair, by one product where that is faster; ``biases`` has one a weight, or none.

    In eager PyTorch a layer whose result nobody uses keeps no gradient, as if it had been called by itself.
    """
    if _torch.compiling() or _torch.func_transforms_active():
        return _forward(x, weights, biases)
    observed = _tracing.observed()  # who looks on sees into plain operators
    if not observed:
        check_memory_of_all("inputs", [x])
        check_memory_of_all("gate_weights", weights)
        check_memory_of_all("gate_biases", biases)
    if autocast_enabled(x.device.type):
        x = cast_floats(x, torch.get_autocast_dtype(x.device.type))  # once for all
        return [F.linear(x, weight, *biases[k : k + 1]) for k, weight in enumerate(weights)]
    few = torch.is_grad_enabled() and x.is_cpu and x.shape[0] < _JOINT_ROWS
    if few or observed:
        return [F.linear(x, weight, *biases[k : k + 1]) for k, weight in enumerate(weights)]
    if not torch.is_grad_enabled():
        return _forward(x, weights, biases)
    held = held_leaves(*weights, *biases)
    results = list(cast(Any, _JointLinear.apply(len(weights), x, *weights, *biases)))
    del held
    return results


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    joined = F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)) if biases else None)
    return list(joined.split([len(w) for w in weights], dim=1))


class _JointLinear(torch.autograd.Function):
    """``apply(count, x, *weights, *biases)`` -> a result a weight."""

    @staticmethod
    def forward(ctx: Any, count: int, x: Tensor, *layers: Tensor) -> Any:
        ctx.count = count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *layers[:count])
        return tuple(_forward(x, layers[:count], layers[count:]))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights = ctx.saved_tensors
        check_memory_of_all("inputs", [x])
        check_memory_of_all("gate_weights", weights)
        used = [k for k, grad in enumerate(grads) if grad is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        sizes = [len(weights[k]) for k in used]
        joined = torch.cat([grads[k] for k in used], dim=1)
        need_x, flags = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        grad_x = joined @ torch.cat([weights[k] for k in used]) if need_x else None
        grad_layers: list[Any] = [None] * len(flags)
        parts = (joined.t() @ x, joined.sum(0)) if any(flags) else ()
        for at, part in zip(range(0, len(flags), ctx.count), parts, strict=False):
            for k, grad in zip(used, part.split(sizes), strict=True):
                grad_layers[at + k] = grad
        return (None, grad_x, *grad_layers)
