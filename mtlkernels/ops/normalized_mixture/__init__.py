"""Normalized mixture: a level of experts whose layers have batch norm, layer norm, dropout or learned slopes.

The public function is :func:`mtlkernels.expert_mixture`, which comes here where a norm or dropout is active, or an
activation has slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._autograd import apply
from mtlkernels.ops._call import distinct, needs_function, run_forward, traced_under_func
from mtlkernels.ops.normalized_mixture.autograd import NormalizedMixture, Plan
from mtlkernels.ops.normalized_mixture.norms import Norm, check_rows, parameters, update_running_statistics
from mtlkernels.routing import Wiring

_OP = "normalized_mixture"


def normalized_mixture(
    streams: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    logits: Sequence[Tensor],
    norms: Sequence[Norm | None],
    slopes: Sequence[Tensor | None],
    dice_eps: tuple[float, ...],
    dropout: tuple[float, ...],
    wiring: Wiring,
    flat: tuple[tuple[int, ...], ...],
    unused: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The level's outputs; running statistics are then brought up to date.

    Args:
        streams, weights, biases, logits, slopes: checked, and of the experts that some gate mixes, as operators take
            them.
        norms: a layer each, of all experts; none that uses running statistics.
        dice_eps, dropout: a number a layer.
        wiring: of the routing.
        flat: streams of the experts, experts and sizes of the gates, and activations, as operators take them.
        unused: parameters of the other experts, whose gradients are zero.
    """
    x = streams[0]
    check_rows(norms, x)
    scales, shifts = (parameters(norms, part, wiring.live) for part in ("weight", "bias"))
    others = [parameters(norms, part, wiring.idle) for part in ("weight", "bias")]
    unused = [*unused, *(t for part in others for t in part if t is not None)]
    codes = tuple(0 if norm is None else norm.code for norm in norms)
    eps = tuple(0.0 if norm is None else norm.eps for norm in norms)
    seed = torch.randint(0, 2**63 - 1, (1,), device=x.device) if any(dropout) else None
    settings: Any = (*flat, codes, eps, dice_eps, dropout)
    groups = (streams, weights, biases, scales, shifts, slopes, logits)
    backend = _backends.forced()
    traced = traced_under_func(_OP)
    if not traced and needs_function(*groups, unused):
        plan = Plan(len(streams), backend, *settings)
        tensors = distinct(*(t for group in groups for t in group), seed, *unused)
        out = apply(NormalizedMixture, plan, *tensors)
        outputs = out[: len(logits)]
        _, means, variances = plan.split_saved(out[len(logits) :])
    else:
        found = run_forward(_OP, "reference" if traced else backend, x, *groups, *settings, seed)
        outputs, _, means, variances = found
    present = [norm for norm in norms if norm is not None]
    update_running_statistics(present, wiring.live, means, variances, x.shape[0])
    return tuple(outputs)
