"""Derivatives of expert_mixture, of every order, and its rule for vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtlkernels._backends import implementation, register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import (
    batched_backward,
    by_example,
    call,
    copies,
    differentiate_lists_twice,
    front,
    grads_are_batched,
)
from mtlkernels.ops._call import run_cpp, run_forward
from mtlkernels.ops._reach import keep, reach_of
from mtlkernels.ops.expert_mixture import reference

_OP = "expert_mixture"


@dataclass(frozen=True)
class Plan:
    """What is static about a call: the routing in the operators' flat form, the layers, and how to run it."""

    expert_inputs: tuple[int, ...]
    gate_experts: tuple[int, ...]
    gate_sizes: tuple[int, ...]
    activations: tuple[int, ...]
    num_inputs: int
    backend: str | None
    direct: bool = False  # straight to the C++ operator, which checks what it is given

    @property
    def num_weights(self) -> int:
        return len(self.activations) * len(self.expert_inputs)

    @property
    def routing(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.expert_inputs, self.gate_experts, self.gate_sizes, self.activations

    def split(self, tensors: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Inputs, weights, biases, gate logits, and what follows them."""
        a = self.num_inputs
        b = a + self.num_weights
        c = b + self.num_weights
        d = c + len(self.gate_sizes)
        return tensors[:a], tensors[a:b], tensors[b:c], tensors[c:d], tensors[d:]

    def repeated(self, times: int, shared_inputs: bool) -> Plan:
        """The routing of ``times`` independent copies side by side; ``shared_inputs``: all read the same streams."""
        streams, experts = (0 if shared_inputs else self.num_inputs), len(self.expert_inputs)
        return replace(
            self,
            expert_inputs=tuple(s + v * streams for v in range(times) for s in self.expert_inputs),
            gate_experts=tuple(e + v * experts for v in range(times) for e in self.gate_experts),
            gate_sizes=self.gate_sizes * times,
            num_inputs=self.num_inputs * (1 if shared_inputs else times),
        )


class ExpertMixture(torch.autograd.Function):
    """``apply(plan, *inputs, *weights, *biases, *gate_logits, *idle)`` -> K outputs, then one tensor a saved layer.

    ``idle`` are the parameters of experts that no gate mixes: they take no part, and their gradient is zero.
    """

    @staticmethod
    def forward(plan: Plan, *tensors: Any) -> Any:
        inputs, weights, biases, logits, _ = plan.split(tensors)
        args = (inputs, weights, biases, logits, *plan.routing, True)
        outputs, saved = (
            run_cpp(_OP, "forward", *args) if plan.direct else run_forward(_OP, plan.backend, inputs[0], *args)
        )
        return (*outputs, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *tensors = inputs
        saved = output[len(plan.gate_sizes) :]
        ctx.mark_non_differentiable(*saved)
        if not torch.compiler.is_compiling():  # which does not trace it, and drops zeros that nobody reads
            ctx.set_materialize_grads(False)  # zeros for what is saved, as large as that, took a tenth of a step
        ctx.plan, ctx.num_saved = plan, len(saved)
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors  # once: checkpointing recomputes them at each access
        tensors, saved = kept[: -ctx.num_saved], kept[-ctx.num_saved :]
        *groups, idle = plan.split(tensors)
        *flags, idle_flags = plan.split(ctx.needs_input_grad[1:])
        needs = tuple(any(group) for group in flags)
        inputs, weights = groups[:2]
        shape = (inputs[0].shape[0], weights[-1].shape[0])
        grad_outputs = [inputs[0].new_zeros(shape) if grad is None else grad for grad in grads[: len(plan.gate_sizes)]]
        used = [tensor for group in groups for tensor in group]
        found = iter(call(ExpertMixtureBackward, plan, needs, *grad_outputs, *used, *saved) if any(needs) else ())
        reach = reach_of(grads[: len(plan.gate_sizes)], plan.num_inputs, *plan.routing[:3])
        reached = (None,) * 4 if reach is None else (reach.inputs, reach.experts, reach.experts, reach.gates)
        result: list[Tensor | None] = [None]
        for group, need, some in zip(groups, needs, reached, strict=True):
            part = [next(found) if need and tensor is not None else None for tensor in group]
            result += part if some is None else keep(part, some)
        result += [
            torch.zeros_like(t) if t is not None and need else None for t, need in zip(idle, idle_flags, strict=True)
        ]
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Any) -> Any:
        return _vmap_forward(ExpertMixture.apply, info.batch_size, in_dims[1:], plan, tensors)


def _vmap_forward(run: Callable[..., Any], size: int, in_dims: Any, plan: Plan, tensors: Any) -> Any:
    """The rule for vmap, for ``run(plan, *tensors)`` that returns outputs and, perhaps, saved tensors."""
    gates, layers = len(plan.gate_sizes), len(plan.activations)
    inputs, weights, biases, logits, _ = plan.split(tensors)
    x_dims, w_dims, b_dims, l_dims, _ = plan.split(in_dims)
    if all(dim is None for dim in (*w_dims, *b_dims)):  # one set of experts: the examples become rows
        rows = [
            [front(t, dim, size).flatten(0, 1) for t, dim in zip(ts, dims, strict=True)]
            for ts, dims in ((inputs, x_dims), (logits, l_dims))
        ]
        out = run(plan, *rows[0], *weights, *biases, *rows[1])
        ys = [by_example(y, 0, size) for y in out[:gates]]
        saved = [by_example(s, 1, size) for s in out[gates:]]
        return (*ys, *saved), (0,) * gates + (1,) * len(saved)
    shared = all(dim is None for dim in x_dims)  # different experts: the examples become further experts
    x = list(inputs) if shared else _slices(inputs, x_dims, size, 1)
    w = _slices(weights, w_dims, size, layers)
    b = _slices(biases, b_dims, size, layers)
    each = _slices(logits, l_dims, size, 1)
    out = run(plan.repeated(size, shared), *x, *w, *b, *each)
    ys = [torch.stack(out[k : size * gates : gates]) for k in range(gates)]
    saved = [by_example(s, 0, size) for s in out[size * gates :]]
    return (*ys, *saved), (0,) * (gates + len(saved))


class ExpertMixtureBackward(torch.autograd.Function):
    """``apply(plan, needs, *grad_outputs, *inputs, *weights, *biases, *gate_logits, *saved)`` -> the gradients wanted.

    ``needs``: whether inputs, weights, biases and logits want theirs; they come in that order, none for a bias that
    is None. A function of its own so that it has derivatives and a rule for vmap.
    """

    @staticmethod
    def forward(plan: Plan, needs: tuple[bool, bool, bool, bool], *tensors: Any) -> Any:
        gates = len(plan.gate_sizes)
        if grads_are_batched(tensors[:gates]):
            return batched_backward(ExpertMixtureBackward, (plan, needs), tensors)
        inputs, weights, biases, logits, saved = plan.split(tensors[gates:])
        run = implementation(_OP, "backward", plan.backend, inputs[0])
        dx, dw, db, dl = run(tensors[:gates], inputs, weights, biases, logits, saved, *plan.routing, *needs)
        return (*dx, *dw, *(g for g, bias in zip(db, biases, strict=False) if bias is not None), *dl)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        gates = len(plan.gate_sizes)
        tensors = ctx.saved_tensors
        *groups, saved = plan.split(tensors[gates:])

        def forward(inputs: Any, weights: Any, biases: Any, logits: Any) -> tuple[Tensor, ...]:
            return tuple(reference.forward(inputs, weights, biases, logits, *plan.routing, False)[0])

        grad_grads, result = differentiate_lists_twice(forward, groups, ctx.needs, tensors[:gates], grads)
        return (None, None, *grad_grads, *result, *[None] * len(saved))

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, needs: Any, *tensors: Any) -> Any:
        size = info.batch_size
        gates, layers, experts = len(plan.gate_sizes), len(plan.activations), len(plan.expert_inputs)
        dims = in_dims[2:]
        grads = _slices(tensors[:gates], dims[:gates], size, 1)
        inputs, weights, biases, logits, saved = plan.split(tensors[gates:])
        x_dims, w_dims, b_dims, l_dims, s_dims = plan.split(dims[gates:])
        shared = not needs[0] and all(dim is None for dim in x_dims)
        x = list(inputs) if shared else _slices(inputs, x_dims, size, 1)
        w = _slices(weights, w_dims, size, layers)
        b = _slices(biases, b_dims, size, layers)
        each = _slices(logits, l_dims, size, 1)
        s = [front(t, dim, size).flatten(0, 1) for t, dim in zip(saved, s_dims, strict=True)]
        wide = plan.repeated(size, shared)
        out = iter(ExpertMixtureBackward.apply(wide, needs, *grads, *x, *w, *b, *each, *s))
        biased_layers = sum(bias is not None for bias in biases) // experts
        shapes = ((len(inputs), 1), (experts, layers), (experts, biased_layers), (gates, 1))
        result = [
            grad
            for need, (width, blocks) in zip(needs, shapes, strict=True)
            if need
            for grad in _regrouped(out, size, width, blocks)
        ]
        return tuple(result), (0,) * len(result)


def _regrouped(grads: Iterator[Tensor], size: int, width: int, blocks: int) -> list[Tensor]:
    """The inverse of :func:`_slices`: takes the slices from ``grads`` and stacks those of one tensor."""
    result = []
    for _ in range(blocks):
        run = [next(grads) for _ in range(size * width)]
        result += [torch.stack(run[i::width]) for i in range(width)]
    return result


def _slices(tensors: Any, dims: Any, size: int, blocks: int) -> list[Tensor | None]:
    """Lists the slices of vmapped tensors example by example, within each of ``blocks`` equal runs of tensors."""
    slices = [copies(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)]
    width = len(slices) // blocks
    return [slices[block * width + i][v] for block in range(blocks) for v in range(size) for i in range(width)]


register_reference(_OP, "forward", reference.forward)
register_reference(_OP, "backward", reference.backward)


def _plan(inputs: Any, routing: Any) -> Plan:
    expert_inputs, gate_experts, gate_sizes, activations = (tuple(part) for part in routing)
    return Plan(expert_inputs, gate_experts, gate_sizes, activations, len(inputs), None)


def _differentiable_forward(inputs: Any, weights: Any, biases: Any, logits: Any, *rest: Any) -> Any:
    *routing, save = rest
    out = ExpertMixture.apply(_plan(inputs, routing), *inputs, *weights, *biases, *logits)
    return list(out[: len(logits)]), list(out[len(logits) :]) if save else []


@torch.library.register_vmap("mtlkernels::expert_mixture_forward")
def _vmap_operator(info: Any, in_dims: Any, *args: Any) -> Any:
    """The operator's own rule, which torch.compile needs where no gradient is wanted."""
    lists, routing, save = args[:4], args[4:8], args[8]
    gates = len(lists[3])

    def run(plan: Plan, *tensors: Any) -> Any:
        inputs, weights, biases, logits, _ = plan.split(tensors)
        found = torch.ops.mtlkernels.expert_mixture_forward(inputs, weights, biases, logits, *plan.routing, save)
        return (*found[0], *found[1])

    dims = [dim for group, ts in zip(in_dims, lists, strict=False) for dim in (group or [None] * len(ts))]
    flat = [t for ts in lists for t in ts]
    out, out_dims = _vmap_forward(run, info.batch_size, dims, _plan(lists[0], routing), flat)
    return (list(out[:gates]), list(out[gates:])), (list(out_dims[:gates]), list(out_dims[gates:]))


register_autograd("expert_mixture_forward", _differentiable_forward)
