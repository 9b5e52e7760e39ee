"""Gated mixture: every gate's softmax-weighted sum of experts' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends, _torch, _tracing
from mtlkernels.ops._call import (
    apply,
    distinct,
    needs_function,
    needs_plain,
    run_forward,
    traced_under_func,
    under_autocast,
)
from mtlkernels.ops._checks import Tensors, check_logits, check_routing, check_tensor, shape_of
from mtlkernels.ops.gated_mixture.autograd import GatedMixture, ListMixture, Plan
from mtlkernels.ops.gated_mixture.plain import logits_by_gate, mix, mix_each
from mtlkernels.routing import Routing


def gated_mixture(experts: Tensor, gate_logits: Tensor | Tensors, routing: Routing) -> tuple[Tensor, ...]:
    """Mixes experts' outputs by every gate at once: ``y_k = sum_e softmax(logits_k)_e * experts[:, e]``.

    The mixing of MMoE (Ma et al., KDD 2018, equations 6 and 7) and of PLE (Tang et al., RecSys 2020). The softmax and
    the sums are in float32 (float64 for float64 inputs). Differentiable in ``experts`` and ``gate_logits``.

    Args:
        experts: [B, E, H], any strides; float32, bfloat16, float16 or float64.
        gate_logits: K tensors [B, N_k], in the order of ``routing.gate_experts[k]``, or one tensor [B, sum N_k].
            Any of the four dtypes; float64 only with float64 ``experts``.
        routing: which gate mixes which experts; its ``expert_inputs`` only count the experts here.

    Returns:
        K tensors [B, H] of the dtype of ``experts``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes or devices do not agree with each other or with ``routing``.
    """
    check_routing(routing)
    flat = tuple(e for gate in routing.gate_experts for e in gate)
    sizes = routing.wiring.gate_sizes
    if needs_plain("gated_mixture", experts, gate_logits):
        if _tracing.holds_proxy((experts, gate_logits)):
            return mix(experts, logits_by_gate(gate_logits, sizes), flat, sizes)
        return mix(experts, _tracing.quietly(_check, experts, gate_logits, routing), flat, sizes)
    logits = _check(experts, gate_logits, routing)
    (experts,) = under_autocast(experts, experts)
    backend = _backends.forced()
    if traced_under_func("gated_mixture"):
        return tuple(run_forward("gated_mixture", "reference", experts, experts, logits, flat, sizes))
    if needs_function((experts,), logits):
        return tuple(apply(GatedMixture, Plan(flat, sizes, backend), *distinct(experts, *logits)))
    return tuple(run_forward("gated_mixture", backend, experts, experts, logits, flat, sizes))


def mix_list(
    experts: Sequence[Tensor], gate_logits: Tensor | Sequence[Tensor], routing: Routing, *, apart: bool = False
) -> tuple[Tensor, ...]:
    """:func:`gated_mixture` of the stack of ``experts``, where one that only unused outputs read keeps no gradient.

    Except under torch.compile and in transforms of torch.func: there such a gradient is zero, as that of a stack is.
    ``apart``: each gate by a call of its own, so that no backward pass goes into experts that its losses do not reach;
    the operations of DTensors fail where they are told of a gradient that is not there.
    """
    flat, sizes = tuple(e for gate in routing.gate_experts for e in gate), routing.wiring.gate_sizes
    if apart and len(sizes) > 1:
        outputs: list[Tensor] = []
        for gate, own in zip(routing.gate_experts, logits_by_gate(gate_logits, sizes), strict=True):
            outputs += mix_list([experts[e] for e in gate], [own], Routing((0,) * len(gate), (range(len(gate)),)))
        return tuple(outputs)
    if needs_plain("gated_mixture", experts, gate_logits):
        if _tracing.holds_proxy((experts, gate_logits)):
            return mix_each(experts, logits_by_gate(gate_logits, sizes), flat, sizes)
        logits = _tracing.quietly(check_logits, gate_logits, routing, experts[0].shape[0], experts[0])
        return mix_each(experts, logits, flat, sizes)
    stacked = _torch.compiling() or _torch.func_transforms_active()
    if stacked or not needs_function(experts, (gate_logits,) if isinstance(gate_logits, Tensor) else gate_logits):
        return gated_mixture(torch.stack(list(experts), dim=1), gate_logits, routing)
    logits = check_logits(gate_logits, routing, experts[0].shape[0], experts[0])
    # Experts of different dtypes, as autocast may leave them, stack to the widest.
    (cast,) = under_autocast(experts[0], experts)
    plan = Plan(flat, sizes, _backends.forced())
    return tuple(apply(ListMixture, plan, len(cast), *cast, *logits)[:-1])


def _check(experts: Tensor, gate_logits: Any, routing: Routing) -> list[Tensor]:
    """The gates' logits, once both arguments have been checked."""
    check_tensor("experts", experts, 3, "[B, E, H]")
    if experts.shape[1] != routing.num_experts:
        raise ValueError(
            f"experts must have shape [B, {routing.num_experts}, H] for this routing, got {shape_of(experts)}"
        )
    return check_logits(gate_logits, routing, experts.shape[0], experts)
