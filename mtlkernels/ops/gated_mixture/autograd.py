"""Derivatives of gated_mixture, of every order, and its rule for vmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels._backends import implementation, register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import (
    batched_backward,
    by_example,
    call,
    differentiate_twice,
    front,
    grads_are_batched,
    of_no_examples,
)
from mtlkernels.ops._call import apply, run_forward
from mtlkernels.ops.gated_mixture import reference, schema  # noqa: F401  (it defines the operators)

_OP = "gated_mixture"


@dataclass(frozen=True)
class Plan:
    """What is static about a call: the gates in the operators' flat form, and how to run it."""

    gate_experts: tuple[int, ...]
    gate_sizes: tuple[int, ...]
    backend: str | None


class GatedMixture(torch.autograd.Function):
    """``apply(plan, experts, *gate_logits)`` -> K outputs."""

    @staticmethod
    def forward(plan: Plan, experts: Tensor, *logits: Tensor) -> Any:
        return tuple(run_forward(_OP, plan.backend, experts, experts, logits, plan.gate_experts, plan.gate_sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, *tensors = inputs
        if not _torch.compiling():  # which does not trace it
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = (ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:]))
        grad_experts, grad_logits = _gradients(ctx.plan, needs, grads, ctx.saved_tensors)
        return (None, grad_experts, *grad_logits)

    @staticmethod
    @of_no_examples
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Tensor) -> Any:
        out = cast(Any, GatedMixture.apply(plan, *_as_rows(tensors, in_dims[1:], info.batch_size)))
        return tuple(by_example(y, 0, info.batch_size) for y in out), (0,) * len(out)


def _gradients(plan: Plan, needs: tuple[bool, bool], grads: Any, tensors: Any) -> tuple[Tensor | None, list[Any]]:
    """Of the experts and of each gate's logits, None where none is wanted or a gate's output was not used."""
    experts, *logits = tensors
    result: list[Tensor | None] = [None] * len(logits)
    used = [k for k, grad in enumerate(grads) if grad is not None]
    if not used:
        return None, result
    if len(used) == len(grads):
        found = iter(call(GatedMixtureBackward, plan, needs, *grads, *tensors))
        grad_experts = next(found) if needs[0] else None
        return grad_experts, list(found) if needs[1] else result
    # Of the used gates alone: zeros for the others would be multiplied by what need not be finite.
    gates = list(reference.split_gates(plan.gate_experts, plan.gate_sizes))
    flat = tuple(e for k in used for e in gates[k])
    part = Plan(flat, tuple(plan.gate_sizes[k] for k in used), plan.backend)
    tensors = (*(grads[k] for k in used), experts, *(logits[k] for k in used))
    found = iter(call(GatedMixtureBackward, part, needs, *tensors))
    grad_experts = next(found) if needs[0] else None
    if needs[1]:
        for k in used:
            result[k] = next(found)
    return grad_experts, result


class ListMixture(torch.autograd.Function):
    """``apply(plan, num_experts, *experts, *gate_logits)`` -> K outputs, then the experts [B, E, H].

    Of experts in a list, so that one that only unused outputs read keeps no gradient. Eager only, not for torch.func.
    """

    @staticmethod
    def forward(plan: Plan, num_experts: int, *tensors: Tensor) -> Any:
        experts, logits = torch.stack(tensors[:num_experts], dim=1), tensors[num_experts:]
        outputs = run_forward(_OP, plan.backend, experts, experts, logits, plan.gate_experts, plan.gate_sizes)
        return (*outputs, experts)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, ctx.num_experts, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan, count = ctx.plan, ctx.num_experts
        *tensors, stacked = ctx.saved_tensors
        gates = zip(reference.split_gates(plan.gate_experts, plan.gate_sizes), grads, strict=False)
        reached = {e for gate, grad in gates if grad is not None for e in gate}
        if torch.is_grad_enabled():  # the gradients' own derivatives reach the same experts, and those alone
            experts = enumerate(tensors[:count])
            stacked = torch.stack([x if e in reached else x.detach() for e, x in experts], dim=1)
        flags = ctx.needs_input_grad[2:]
        needs = (any(flags[:count]), any(flags[count:]))
        grad_experts, grad_logits = _gradients(plan, needs, grads[:-1], (stacked, *tensors[count:]))
        each: list[Any] = [None] * count if grad_experts is None else list(grad_experts.unbind(1))
        return (None, None, *(grad if e in reached else None for e, grad in enumerate(each)), *grad_logits)


class GatedMixtureBackward(torch.autograd.Function):
    """``apply(plan, needs, *grad_outputs, experts, *gate_logits)`` -> the gradients wanted, of experts, then logits."""

    @staticmethod
    def forward(plan: Plan, needs: tuple[bool, bool], *tensors: Tensor) -> Any:
        gates = len(plan.gate_sizes)
        if grads_are_batched(tensors[:gates]):
            return batched_backward(GatedMixtureBackward, (plan, needs), tensors)
        experts = tensors[gates]
        run = implementation(_OP, "backward", plan.backend, experts)
        return tuple(run(tensors[:gates], experts, tensors[gates + 1 :], plan.gate_experts, plan.gate_sizes, *needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        gates = len(plan.gate_sizes)
        tensors = ctx.saved_tensors
        grad_outputs, primals = tensors[:gates], tensors[gates:]
        found = iter(grads)
        wanted = [next(found) if ctx.needs[0] else None]
        wanted += [next(found) if ctx.needs[1] else None for _ in range(gates)]

        def forward(experts: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
            return tuple(reference.forward(experts, logits, plan.gate_experts, plan.gate_sizes))

        grad_grads, grad_primals = differentiate_twice(forward, primals, grad_outputs, wanted)
        return (None, None, *grad_grads, *grad_primals)

    @staticmethod
    @of_no_examples
    def vmap(info: Any, in_dims: Any, plan: Plan, needs: Any, *tensors: Tensor) -> Any:
        out = cast(Any, GatedMixtureBackward.apply(plan, needs, *_as_rows(tensors, in_dims[2:], info.batch_size)))
        return tuple(by_example(y, 0, info.batch_size) for y in out), (0,) * len(out)


def _as_rows(tensors: tuple[Tensor, ...], dims: Any, size: int) -> list[Tensor]:
    """Every argument is a function of the row, so vmapped examples become rows."""
    return [front(tensor, dim, size).flatten(0, 1) for tensor, dim in zip(tensors, dims, strict=True)]


register_reference(_OP, "forward", reference.forward)
register_reference(_OP, "backward", reference.backward)


@torch.library.register_vmap("mtlkernels::gated_mixture_forward")
@of_no_examples
def _vmap_operator(info: Any, in_dims: Any, experts: Tensor, logits: Any, gate_experts: Any, gate_sizes: Any) -> Any:
    """The operator's own rule, which torch.compile needs where no gradient is wanted."""
    dims = (in_dims[0], *(in_dims[1] or [None] * len(logits)))
    first, *rest = _as_rows((experts, *logits), dims, info.batch_size)
    out = torch.ops.mtlkernels.gated_mixture_forward(first, rest, gate_experts, gate_sizes)
    return [by_example(y, 0, info.batch_size) for y in out], [0] * len(out)


def _differentiable_forward(experts: Tensor, logits: Any, gate_experts: Any, gate_sizes: Any) -> list[Tensor]:
    return list(apply(GatedMixture, Plan(tuple(gate_experts), tuple(gate_sizes), None), experts, *logits))


register_autograd("gated_mixture_forward", _differentiable_forward)
