"""Derivatives of normalized_mixture, of every order, and its rule for vmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlkernels._backends import implementation, register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import (
    batched_backward,
    call,
    differentiate_lists_twice,
    example_by_example,
    grads_are_batched,
)
from mtlkernels.ops._call import run_forward
from mtlkernels.ops._reach import keep, reach_of
from mtlkernels.ops.normalized_mixture import reference

_OP = "normalized_mixture"


@dataclass(frozen=True)
class Plan:
    """What is static about a call: the routing in the operators' flat form, the layers, and how to run it."""

    num_inputs: int
    backend: str | None
    expert_inputs: tuple[int, ...]
    gate_experts: tuple[int, ...]
    gate_sizes: tuple[int, ...]
    activations: tuple[int, ...]
    norms: tuple[int, ...]
    eps: tuple[float, ...]
    dice_eps: tuple[float, ...]
    dropout: tuple[float, ...]

    @property
    def settings(self) -> Any:
        """The operators' arguments that are no tensors."""
        routing = (self.expert_inputs, self.gate_experts, self.gate_sizes)
        return *routing, self.activations, self.norms, self.eps, self.dice_eps, self.dropout

    def split(self, tensors: Any) -> Any:
        """Inputs, weights, biases, scales, shifts, slopes, gate logits, and what follows them."""
        each = len(self.activations) * len(self.expert_inputs)
        parts = []
        for size in (self.num_inputs, *[each] * 5, len(self.gate_sizes)):
            parts.append(tensors[:size])
            tensors = tensors[size:]
        return *parts, tensors

    def split_saved(self, tensors: Any) -> tuple[Any, Any, Any]:
        """The operator's saved tensors, means and variances."""
        a = len(self.activations)
        b = a + sum(norm > 0 for norm in self.norms)
        return tensors[:a], tensors[a:b], tensors[b:]


class NormalizedMixture(torch.autograd.Function):
    """``apply(plan, *inputs, *weights, *biases, *scales, *shifts, *slopes, *gate_logits, seed, *idle)``.

    Returns K outputs, then a saved tensor a layer, then means and variances. ``idle`` are the parameters of experts
    that no gate mixes: they take no part, and their gradient is zero.
    """

    @staticmethod
    def forward(plan: Plan, *tensors: Any) -> Any:
        *groups, rest = plan.split(tensors)
        found = run_forward(_OP, plan.backend, tensors[0], *groups, *plan.settings, rest[0])
        return tuple(tensor for part in found for tensor in part)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *tensors = inputs
        kept = output[len(plan.gate_sizes) :]
        ctx.mark_non_differentiable(*kept)
        if not torch.compiler.is_compiling():  # which does not trace it, and drops zeros that nobody reads
            ctx.set_materialize_grads(False)  # zeros for what is saved, as large as that
        ctx.plan = plan
        ctx.num_kept = len(kept)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # once: checkpointing recomputes them at each access
        tensors, kept = saved[: -ctx.num_kept], saved[-ctx.num_kept :]
        *groups, (seed, *idle) = plan.split(tensors)
        *flags, (_, *idle_flags) = plan.split(ctx.needs_input_grad[1:])
        inputs, weights, biases, scales, shifts, slopes, logits = (any(group) for group in flags)
        needs = (inputs, weights, biases, scales or shifts, slopes, logits)
        shape = (groups[0][0].shape[0], groups[1][-1].shape[0])
        grad_outputs = [groups[0][0].new_zeros(shape) if g is None else g for g in grads[: len(plan.gate_sizes)]]
        used = [tensor for group in groups for tensor in group]
        run = (NormalizedMixtureBackward, plan, needs, *grad_outputs, *used, seed, *kept)
        found = iter(call(*run) if any(needs) else ())
        routing = (plan.expert_inputs, plan.gate_experts, plan.gate_sizes)
        reach = reach_of(grads[: len(plan.gate_sizes)], plan.num_inputs, *routing)
        reached = (None,) * 7 if reach is None else (reach.inputs, *[reach.experts] * 5, reach.gates)
        result: list[Tensor | None] = [None]
        for group, need, some in zip(groups, _by_group(needs), reached, strict=True):
            part = [next(found) if need and tensor is not None else None for tensor in group]
            result += part if some is None else keep(part, some)
        result += [None]
        result += [
            torch.zeros_like(t) if t is not None and need else None for t, need in zip(idle, idle_flags, strict=True)
        ]
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Any) -> Any:
        def run(*example: Any) -> Any:
            return NormalizedMixture.apply(plan, *example)

        return example_by_example(run, info.batch_size, in_dims[1:], tensors)


class NormalizedMixtureBackward(torch.autograd.Function):
    """``apply(plan, needs, *grad_outputs, *inputs, …, *gate_logits, seed, *saved, *means, *variances)``.

    Returns the gradients wanted. ``needs``: whether inputs, weights, biases, scales and shifts, slopes, and logits want
    theirs; they come in that order, none for a tensor that is None. A function of its own so that it has derivatives
    and a rule for vmap.
    """

    @staticmethod
    def forward(plan: Plan, needs: tuple[bool, ...], *tensors: Any) -> Any:
        gates = len(plan.gate_sizes)
        if grads_are_batched(tensors[:gates]):
            return batched_backward(NormalizedMixtureBackward, (plan, needs), tensors)
        inputs, weights, biases, *affine, logits, (seed, *kept) = plan.split(tensors[gates:])
        run = implementation(_OP, "backward", plan.backend, inputs[0])
        kept_parts = plan.split_saved(kept)
        dx, dw, db, *others = run(
            tensors[:gates], inputs, weights, *affine, logits, *kept_parts, *plan.settings, seed, *needs
        )
        biased = (g for g, bias in zip(db, biases, strict=False) if bias is not None)
        return (*dx, *dw, *biased, *(g for part in others for g in part))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        gates = len(plan.gate_sizes)
        tensors = ctx.saved_tensors
        *groups, (seed, *kept) = plan.split(tensors[gates:])

        forward_of_lists: Any = reference.forward

        def forward(*lists: Any) -> tuple[Tensor, ...]:
            return tuple(forward_of_lists(*lists, *plan.settings, seed)[0])

        needs = _by_group(ctx.needs)
        grad_grads, result = differentiate_lists_twice(forward, groups, needs, tensors[:gates], grads)
        return (None, None, *grad_grads, *result, None, *[None] * len(kept))

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, needs: Any, *tensors: Any) -> Any:
        def run(*example: Any) -> Any:
            return NormalizedMixtureBackward.apply(plan, needs, *example)

        return example_by_example(run, info.batch_size, in_dims[2:], tensors)


def _by_group(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """``needs`` for each group of tensors: scales and shifts go together."""
    inputs, weights, biases, norms, slopes, logits = needs
    return inputs, weights, biases, norms, norms, slopes, logits


register_reference(_OP, "forward", reference.forward)
register_reference(_OP, "backward", reference.backward)


def _nested(plan: Plan, flat: Any) -> tuple[list[Tensor], ...]:
    """What the Function returns as the operator returns it."""
    gates = len(plan.gate_sizes)
    return list(flat[:gates]), *(list(part) for part in plan.split_saved(flat[gates:]))


def _plan(inputs: Any, settings: Any) -> Plan:
    return Plan(len(inputs), None, *map(tuple, settings))


def _differentiable_forward(*args: Any) -> Any:
    plan = _plan(args[0], args[7:15])
    flat = [tensor for group in args[:7] for tensor in group]
    return _nested(plan, NormalizedMixture.apply(plan, *flat, args[15]))


@torch.library.register_vmap("mtlkernels::normalized_mixture_forward")
def _vmap_operator(info: Any, in_dims: Any, *args: Any) -> Any:
    """The operator's own rule, which torch.compile needs where no gradient is wanted."""
    plan = _plan(args[0], args[7:15])

    def run(*example: Any) -> Any:
        *groups, (seed,) = plan.split(example)
        found = torch.ops.mtlkernels.normalized_mixture_forward(*groups, *plan.settings, seed)
        return [tensor for part in found for tensor in part]

    dims = [dim for group, ts in zip(in_dims, args[:7], strict=False) for dim in (group or [None] * len(ts))]
    flat = [tensor for group in args[:7] for tensor in group]
    out, out_dims = example_by_example(run, info.batch_size, (*dims, in_dims[15]), (*flat, args[15]))
    return _nested(plan, out), _nested(plan, out_dims)


register_autograd("normalized_mixture_forward", _differentiable_forward)
