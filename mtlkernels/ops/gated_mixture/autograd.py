"""Derivatives of gated_mixture, of every order, and its rule for vmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlkernels._backends import implementation, register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import batched_backward, by_example, call, differentiate_twice, front, grads_are_batched
from mtlkernels.ops._call import run_forward
from mtlkernels.ops.gated_mixture import reference

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
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = (ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:]))
        found = iter(call(GatedMixtureBackward, ctx.plan, needs, *grads, *ctx.saved_tensors))
        grad_experts = next(found) if needs[0] else None
        grad_logits = tuple(found) if needs[1] else (None,) * len(grads)
        return (None, grad_experts, *grad_logits)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Tensor) -> Any:
        out = GatedMixture.apply(plan, *_as_rows(tensors, in_dims[1:], info.batch_size))
        return tuple(by_example(y, 0, info.batch_size) for y in out), (0,) * len(out)


class GatedMixtureBackward(torch.autograd.Function):
    """``apply(plan, needs, *grad_outputs, experts, *gate_logits)`` -> the gradients wanted, of experts, then logits."""

    @staticmethod
    def forward(plan: Plan, needs: tuple[bool, bool], *tensors: Tensor) -> Any:
        gates = len(plan.gate_sizes)
        if grads_are_batched(tensors[:gates]):
            return batched_backward(GatedMixtureBackward, (plan, needs), tensors)
        experts = tensors[gates]
        run = implementation(_OP, "backward", plan.backend, experts)
        grad_experts, grad_logits = run(
            tensors[:gates], experts, tensors[gates + 1 :], plan.gate_experts, plan.gate_sizes, *needs
        )
        return (*grad_experts, *grad_logits)

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
    def vmap(info: Any, in_dims: Any, plan: Plan, needs: Any, *tensors: Tensor) -> Any:
        out = GatedMixtureBackward.apply(plan, needs, *_as_rows(tensors, in_dims[2:], info.batch_size))
        return tuple(by_example(y, 0, info.batch_size) for y in out), (0,) * len(out)


def _as_rows(tensors: tuple[Tensor, ...], dims: Any, size: int) -> list[Tensor]:
    """Every argument is a function of the row, so vmapped examples become rows."""
    return [front(tensor, dim, size).flatten(0, 1) for tensor, dim in zip(tensors, dims, strict=True)]


register_reference(_OP, "forward", reference.forward)
register_reference(_OP, "backward", reference.backward)


@torch.library.register_vmap("mtlkernels::gated_mixture_forward")
def _vmap_operator(info: Any, in_dims: Any, experts: Tensor, logits: Any, gate_experts: Any, gate_sizes: Any) -> Any:
    """The operator's own rule, which torch.compile needs where no gradient is wanted."""
    dims = (in_dims[0], *(in_dims[1] or [None] * len(logits)))
    first, *rest = _as_rows((experts, *logits), dims, info.batch_size)
    out = torch.ops.mtlkernels.gated_mixture_forward(first, rest, gate_experts, gate_sizes)
    return [by_example(y, 0, info.batch_size) for y in out], [0] * len(out)


def _differentiable_forward(experts: Tensor, logits: Any, gate_experts: Any, gate_sizes: Any) -> list[Tensor]:
    return list(GatedMixture.apply(Plan(tuple(gate_experts), tuple(gate_sizes), None), experts, *logits))


register_autograd("gated_mixture_forward", _differentiable_forward)
