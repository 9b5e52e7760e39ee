"""Derivatives of expert_level: of the first order by its operator, of higher ones by those of its parts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlkernels._backends import implementation, register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import call, example_by_example, grads_are_batched
from mtlkernels.ops._call import run_cpp, run_forward
from mtlkernels.ops._reach import keep, reach_of
from mtlkernels.ops.expert_level import reference
from mtlkernels.ops.expert_mixture.autograd import ExpertMixtureBackward
from mtlkernels.ops.expert_mixture.autograd import Plan as MixturePlan

_OP = "expert_level"


@dataclass(frozen=True)
class Plan:
    """That of the expert mixture, with the gates' weights and biases in the place of logits."""

    mixture: MixturePlan

    @staticmethod
    def of(num_inputs: int, backend: str | None, routing: Any, direct: bool = False) -> Plan:
        """Of the operators' arguments: streams of the experts, experts and sizes of the gates, activations."""
        expert_inputs, gate_experts, gate_sizes, activations = routing
        return Plan(MixturePlan(expert_inputs, gate_experts, gate_sizes, activations, num_inputs, backend, direct))

    def split(self, tensors: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
        """Inputs, weights, biases, gates' weights, gates' biases, and what follows them."""
        inputs, weights, biases, gate_weights, rest = self.mixture.split(tensors)
        gates = len(gate_weights)
        return inputs, weights, biases, gate_weights, rest[:gates], rest[gates:]


class ExpertLevel(torch.autograd.Function):
    """``apply(plan, *inputs, *weights, *biases, *gate_weights, *gate_biases, *idle)``.

    Returns K outputs, one tensor a saved layer, and the logits. ``idle`` as in ``ExpertMixture``.
    """

    @staticmethod
    def forward(plan: Plan, *tensors: Any) -> Any:
        *groups, _ = plan.split(tensors)
        args = (*groups, *plan.mixture.routing, True)
        outputs, saved, logits = (
            run_cpp(_OP, "forward", *args)
            if plan.mixture.direct
            else run_forward(_OP, plan.mixture.backend, tensors[0], *args)
        )
        return (*outputs, *saved, logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *tensors = inputs
        kept = output[len(plan.mixture.gate_sizes) :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.num_kept = plan, len(kept)
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        gates = len(plan.mixture.gate_sizes)
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        stored = ctx.saved_tensors  # once: checkpointing recomputes them at each access
        *groups, idle = plan.split(stored[: -ctx.num_kept])
        *flags, idle_flags = plan.split(ctx.needs_input_grad[1:])
        needs = tuple(any(group) for group in flags)
        inputs, weights = groups[:2]
        shape = (inputs[0].shape[0], weights[-1].shape[0])
        grad_outputs = [inputs[0].new_zeros(shape) if grad is None else grad for grad in grads[:gates]]
        *saved, logits = stored[-ctx.num_kept :]
        run = _by_parts if torch.is_grad_enabled() or grads_are_batched(grad_outputs) else _by_operator
        found = run(plan, needs, grad_outputs, groups, saved, logits) if any(needs) else [()] * len(groups)
        reach = reach_of(grads[:gates], len(inputs), *plan.mixture.routing[:3], gates_read=True)
        reached = (None,) * 5
        if reach is not None:
            reached = (reach.inputs, reach.experts, reach.experts, reach.gates, reach.gates)  # type: ignore[assignment]
        result: list[Tensor | None] = [None]
        for group, need, part, some in zip(groups, needs, found, reached, strict=True):
            grads_of = part if need else [None] * len(group)
            result += grads_of if some is None else keep(grads_of, some)
        for tensor, need in zip(idle, idle_flags, strict=True):
            result.append(torch.zeros_like(tensor) if tensor is not None and need else None)
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Any) -> Any:
        """A call an example: the public function does not come here under torch.func."""
        run = functools.partial(ExpertLevel.apply, plan)
        return example_by_example(run, info.batch_size, in_dims[1:], tensors)


def _of_those(found: Any, group: Any) -> list[Tensor | None]:
    """Gradients of biases that there are."""
    return [None if tensor is None else grad for grad, tensor in zip(found, group, strict=True)]


def _by_operator(plan: Plan, needs: Any, grad_outputs: Any, groups: Any, saved: Any, logits: Tensor) -> Any:
    """The gradients of each group of tensors that wants some."""
    inputs, weights, biases, gate_weights, gate_biases = groups
    run = implementation(_OP, "backward", plan.mixture.backend, inputs[0])
    args = (inputs, weights, biases, gate_weights, logits, saved, *plan.mixture.routing, *needs)
    dx, dw, db, dgw, dgb = run(grad_outputs, *args)
    return dx, dw, db and _of_those(db, biases), dgw, dgb and _of_those(dgb, gate_biases)


def _by_parts(plan: Plan, needs: Any, grad_outputs: Any, groups: Any, saved: Any, _: Any) -> Any:
    """The same by steps that have derivatives: that of the expert mixture, and matrix products."""
    inputs, weights, biases, gate_weights, gate_biases = groups
    logits = reference.gate_logits(inputs, gate_weights, gate_biases)
    mixture_needs = (*needs[:3], needs[0] or needs[3] or needs[4])
    used = [tensor for group in (inputs, weights, biases, logits) for tensor in group]
    found: Iterator[Any] = iter(call(ExpertMixtureBackward, plan.mixture, mixture_needs, *grad_outputs, *used, *saved))
    parts: Any = (
        [next(found) if need and tensor is not None else None for tensor in group]
        for group, need in zip((inputs, weights, biases, logits), mixture_needs, strict=True)
    )
    dx, dw, db, grad_logits = parts
    own: Any = (grad_logits, inputs, gate_weights, dx if needs[0] else [])
    dx, dgw, dgb = reference.gate_gradients(*own, *needs[3:])
    return dx, dw, db, dgw, dgb and _of_those(dgb, gate_biases)


register_reference(_OP, "forward", reference.forward)
register_reference(_OP, "backward", reference.backward)


def _differentiable_forward(*args: Any) -> Any:
    *groups, expert_inputs, gate_experts, gate_sizes, activations, save = args
    plan = Plan.of(len(groups[0]), None, tuple(map(tuple, (expert_inputs, gate_experts, gate_sizes, activations))))
    out = ExpertLevel.apply(plan, *(tensor for group in groups for tensor in group))
    gates = len(gate_sizes)
    logits = out[-1] if save else out[-1].new_empty(0, out[-1].shape[1])
    return list(out[:gates]), list(out[gates:-1]) if save else [], logits


register_autograd("expert_level_forward", _differentiable_forward)
