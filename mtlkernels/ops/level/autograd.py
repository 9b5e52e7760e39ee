"""Derivatives of a level, of every order, and its rules for vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels._backends import implementation, register_reference, triton_module
from mtlkernels._library import register_autograd
from mtlkernels._tracing import observed
from mtlkernels.ops._autograd import (
    batched_backward,
    by_example,
    call,
    copies,
    differentiate_twice,
    example_by_example,
    front,
    grads_are_batched,
    of_no_examples,
)
from mtlkernels.ops._call import apply, run_forward
from mtlkernels.ops.level import reference, schema  # noqa: F401  (it defines the operators)
from mtlkernels.ops.level.spec import Groups, LevelSpec

_OP = "level"


class Plan(NamedTuple):
    """What is static about a call: the level, and how to run it.

    ``recorded``: the forward pass was replayed by what was recorded of a call like this one, as the backward pass may
    be. ``losses``: of how many that gets the outputs' gradients, one after another. ``written``: is called with what
    the forward pass saves before that is saved, as a checkpoint's recomputation ends at the last tensor that it wants.
    """

    spec: LevelSpec
    backend: str | None
    recorded: bool = False
    losses: int = 1
    written: Callable[[Sequence[Tensor]], None] | None = None


class Level(torch.autograd.Function):
    """``apply(plan, *tensors, seed, *idle)`` -> K outputs, then what the forward pass saved.

    ``tensors`` are those of the level, see :class:`Groups`. ``idle`` are the parameters of experts that no gate mixes:
    they take no part, and their gradient is zero.
    """

    @staticmethod
    def forward(plan: Plan, *tensors: Any) -> Any:
        spec = plan.spec
        args = (*spec.operands(tensors), *spec.encoded, tensors[spec.num_tensors], True)
        results = run_forward(_OP, plan.backend, tensors[0], *args)
        if plan.written is not None:
            plan.written(spec.split_results(results)[1])
        return tuple(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        plan, *tensors = inputs
        saved = plan.spec.split_results(output)[1]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # zeros for what is saved, as large as that, took a tenth of a step
        ctx.plan, ctx.num_saved = plan._replace(written=None), len(saved)
        ctx.num_gates = len(plan.spec.gate_sizes)
        ctx.losses = None  # several of them, while they take the place of one: see mtlkernels.ops.level.node
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_outputs = grads[: ctx.num_gates]
        nothing = (None,) * len(ctx.needs_input_grad)
        losses = ctx.losses
        if losses is not None and losses.runs():
            losses.run(ctx, grad_outputs)
            return nothing
        if all(grad is None for grad in grad_outputs):
            return nothing
        return (None, *level_gradients(ctx, ctx.saved_tensors, grad_outputs))  # once: checkpointing recomputes them

    @staticmethod
    @of_no_examples
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Any) -> Any:
        def run(spec: LevelSpec, *arguments: Any) -> Any:
            return Level.apply(plan._replace(spec=spec), *arguments)

        return _vmap_forward(run, info.batch_size, in_dims[1:], plan.spec, tensors)


def level_gradients(ctx: Any, stored: Sequence[Any], grad_outputs: Sequence[Any]) -> list[Tensor | None]:
    """Of all tensors that :class:`Level` was applied to; of several losses' ``grad_outputs``, one after another.

    ``stored`` are the saved tensors of its node, which is ``ctx``.
    """
    plan: Plan = ctx.plan
    spec, flags = plan.spec, ctx.needs_input_grad[1:]
    count, gates = spec.num_tensors, len(spec.gate_sizes)
    plan = plan._replace(losses=len(grad_outputs) // gates)
    tensors, saved = stored[: -ctx.num_saved], stored[-ctx.num_saved :]
    needs = tuple(any(group) for group in spec.split(flags))
    # Gradients of linear gates have derivatives where they are made step by step.
    run = _by_parts if spec.gate_inputs and torch.is_grad_enabled() else _by_operator
    found: list[Any] = [None] * (count * plan.losses)
    if any(needs):
        found = run(plan, needs, grad_outputs, tensors[: count + 1], saved)
    result: list[Tensor | None] = []
    for loss in range(plan.losses):
        result += [*found[loss * count : (loss + 1) * count], None]
        for tensor, need in zip(tensors[count + 1 :], flags[count + 1 :], strict=True):
            result.append(torch.zeros_like(tensor) if tensor is not None and need else None)
    return result


def _by_operator(plan: Plan, needs: Any, grad_outputs: Any, tensors: Any, saved: Any) -> list[Tensor | None]:
    """A gradient for each of the level's tensors, None where none is wanted or no gradient reaches it."""
    grads = call(LevelBackward, plan, needs, *grad_outputs, *tensors, *saved)
    return _in_place(plan.spec, grad_outputs, tensors[:-1], needs, grads)


def _in_place(spec: LevelSpec, grad_outputs: Any, tensors: Any, needs: Any, grads: Iterable[Any]) -> list[Any]:
    """What the operator returns, at the place of the tensor whose gradient it is; of one loss after another."""
    losses = len(grad_outputs) // len(spec.gate_sizes)
    result: list[Any] = [None] * (losses * spec.num_tensors)
    for at, grad in zip(spec.returned(grad_outputs, tensors, needs), grads, strict=True):
        result[at] = grad
    return result


def _by_parts(plan: Plan, needs: Any, grad_outputs: Any, tensors: Any, saved: Any) -> list[Tensor | None]:
    """The same, of a level with linear gates, by steps that have derivatives: logits, and a level that takes them."""
    spec, groups = plan.spec, plan.spec.split(tensors[:-1])
    inner = replace(spec, gate_inputs=())
    logits = reference.gate_logits(spec, groups)
    of_level = [*tensors[: -1 - spec.sizes.gates - spec.sizes.gate_biases], *logits]
    of_gates = needs[0] or needs[6] or needs[7]
    inner_needs = (*needs[:6], of_gates, False)
    kept = saved[:-1]  # without the logits
    inner_plan = plan._replace(spec=inner, recorded=False)
    found = inner.split(_by_operator(inner_plan, inner_needs, grad_outputs, (*of_level, None), kept))
    grad_inputs = list(found.inputs)
    grad_weights: list[Any] = [None] * len(logits)
    grad_biases: list[Any] = [None] * len(logits)
    for k, stream in enumerate(spec.gate_inputs):
        grad, x = found.gates[k], groups.inputs[stream]
        if grad is None:
            continue
        if needs[0]:
            more = grad @ groups.gates[k]
            grad_inputs[stream] = more if grad_inputs[stream] is None else grad_inputs[stream] + more
        if needs[6]:
            grad_weights[k] = grad.t() @ x
        if needs[7] and groups.gate_biases[k] is not None:
            grad_biases[k] = grad.sum(0)
    return [*grad_inputs, *(grad for group in found[1:6] for grad in group), *grad_weights, *grad_biases]


class LevelBackward(torch.autograd.Function):
    """``apply(plan, needs, *grad_outputs, *tensors, seed, *saved)`` -> the gradients that the operator returns.

    A function of its own so that it has derivatives and a rule for vmap. ``grad_outputs`` are those of the plan's
    losses, one after another.
    """

    @staticmethod
    def forward(plan: Plan, needs: tuple[bool, ...], *arguments: Any) -> Any:
        spec = plan.spec
        gates = len(spec.gate_sizes) * plan.losses
        if grads_are_batched(arguments[:gates]):
            return batched_backward(LevelBackward, (plan, needs), arguments)
        grad_outputs, tensors = arguments[:gates], arguments[gates:]
        saved = tensors[spec.num_tensors + 1 :]
        if plan.recorded and not observed():
            own = tensors[: spec.num_tensors]
            return tuple(triton_module(_OP).gradients(spec, grad_outputs, own, saved, None, needs))
        args = (*spec.operands(tensors), saved, *spec.encoded, tensors[spec.num_tensors], needs)
        return tuple(implementation(_OP, "backward", plan.backend, tensors[0])(grad_outputs, *args))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, ctx.needs, *arguments = inputs
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        spec, arguments = plan.spec, ctx.saved_tensors
        each, count = len(spec.gate_sizes), spec.num_tensors
        gates = each * plan.losses
        grad_outputs, tensors, seed = arguments[:gates], arguments[gates : gates + count], arguments[gates + count]
        cotangents = _in_place(spec, grad_outputs, tensors, ctx.needs, grads)
        of_outputs: list[Any] = []
        totals: list[Any] = [None] * count
        for loss in range(plan.losses):
            own = grad_outputs[loss * each : (loss + 1) * each]
            found = _second_derivatives(spec, own, tensors, seed, cotangents[loss * count : (loss + 1) * count])
            of_outputs += found[0]
            for i, grad in found[1].items():
                totals[i] = grad if totals[i] is None else totals[i] + grad
        return (None, None, *of_outputs, *totals, *[None] * (len(arguments) - gates - count))

    @staticmethod
    @of_no_examples
    def vmap(info: Any, in_dims: Any, plan: Plan, needs: Any, *arguments: Any) -> Any:
        spec, size, dims = plan.spec, info.batch_size, in_dims[2:]
        gates, count = len(spec.gate_sizes), spec.num_tensors
        grads = _slices(arguments[:gates], dims[:gates], size, 1)
        rest = arguments[gates:]
        returned = spec.returned(arguments[:gates], rest[:count], needs)
        one_level = all(dim is None for dim in dims[gates:])  # of whose outputs there are several gradients
        if plan.losses == 1 and one_level:
            out = cast(Any, LevelBackward.apply(plan._replace(losses=size), needs, *grads, *rest))
            found = _in_place(spec, grads, rest[:count], needs, out)
            return tuple(torch.stack(found[i::count]) for i in returned), (0,) * len(returned)
        if plan.losses > 1 or spec.stores_inputs or spec.gate_inputs:
            return example_by_example(
                lambda *example: LevelBackward.apply(plan, needs, *example), size, dims, arguments
            )
        groups, group_dims = spec.split(rest), spec.split(dims[gates:])
        shared = not needs[0] and all(dim is None for dim in group_dims.inputs)
        wide = _side_by_side(spec, groups, group_dims, size, shared)
        kept = zip(rest[count + 1 :], dims[gates + count + 1 :], strict=True)
        saved = [front(t, dim, size).flatten(0, 1) for t, dim in kept]
        wide_spec = spec.repeated(size, shared)
        out = cast(Any, LevelBackward.apply(plan._replace(spec=wide_spec), needs, *grads, *wide, None, *saved))
        return _restacked(spec, returned, wide_spec, _in_place(wide_spec, grads, wide, needs, out), size)


def _second_derivatives(
    spec: LevelSpec, grad_outputs: Sequence[Any], tensors: Sequence[Any], seed: Any, cotangents: Sequence[Any]
) -> tuple[list[Any], dict[int, Any]]:
    """The gradients of one loss's ``grad_outputs``, and of tensors by their place; ``cotangents`` has one a tensor."""
    part = spec.reached(grad is not None for grad in grad_outputs)
    chosen = [i for i in part.places if tensors[i] is not None]

    def forward(*primals: Tensor) -> tuple[Tensor, ...]:
        filled = list(tensors)
        for i, primal in zip(chosen, primals, strict=True):
            filled[i] = primal
        return tuple(reference.evaluate(part.spec, part.pick(spec.split(filled)), seed)[0])

    present = [grad for grad in grad_outputs if grad is not None]
    primals = [tensors[i] for i in chosen]
    of_present, of_chosen = differentiate_twice(forward, primals, present, [cotangents[i] for i in chosen])
    found = iter(of_present)
    return [None if grad is None else next(found) for grad in grad_outputs], dict(zip(chosen, of_chosen, strict=True))


def _restacked(spec: LevelSpec, returned: Sequence[int], wide: LevelSpec, found: Sequence[Any], size: int) -> Any:
    """The vmapped gradients of a level from those of its examples, which stand side by side in ``wide``."""
    blocks = (1, *[len(spec.layers)] * 5, 1, 1)
    by_tensor: list[Any] = []
    for run, of_wide, count in zip(spec.split(range(spec.num_tensors)), wide.split(found), blocks, strict=True):
        width = len(run) // count
        step = len(of_wide) // count
        by_tensor += [
            [of_wide[block * step + v * width + i] for v in range(step // max(width, 1))]
            for block in range(count)
            for i in range(width)
        ]
    return tuple(torch.stack(by_tensor[i]) for i in returned), (0,) * len(returned)


def _vmap_forward(run: Callable[..., Any], size: int, in_dims: Any, spec: LevelSpec, tensors: Any) -> Any:
    """The rule for vmap, for ``run(spec, *tensors, seed, ...)`` that returns outputs and what is saved."""
    if spec.stores_inputs or spec.gate_inputs:  # each example has statistics, a seed or gates of its own
        return example_by_example(lambda *example: run(spec, *example), size, in_dims, tensors)
    gates = len(spec.gate_sizes)
    groups, dims = spec.split(tensors), spec.split(in_dims)
    if all(dim is None for dim in (*dims.weights, *dims.biases)):  # one set of experts: the examples become rows
        rows = [
            [front(t, dim, size).flatten(0, 1) for t, dim in zip(ts, own, strict=True)]
            for ts, own in ((groups.inputs, dims.inputs), (groups.gates, dims.gates))
        ]
        out = run(spec, *rows[0], *groups.weights, *groups.biases, *rows[1], None)
        last = rows[0][0].shape[0], groups.weights[-1].shape[0]
        saved = [by_example(s, 1, size) if s.dim() == 3 else _panels_by_example(s, *last, size) for s in out[gates:]]
        return (*(by_example(y, 0, size) for y in out[:gates]), *saved), (0,) * gates + (1,) * len(saved)
    shared = all(dim is None for dim in dims.inputs)  # different experts: the examples become further experts
    out = run(spec.repeated(size, shared), *_side_by_side(spec, groups, dims, size, shared), None)
    ys = [torch.stack(out[k : size * gates : gates]) for k in range(gates)]
    saved = [by_example(s, 0, size) for s in out[size * gates :]]
    return (*ys, *saved), (0,) * (gates + len(saved))


def _panels_by_example(saved: Tensor, rows: int, width: int, size: int) -> Tensor:
    """A last layer's panels of ``rows`` of ``size`` examples as those [E, size, B * H] of each example."""
    values = by_example(reference.rows_of_panels(saved, rows, width), 1, size)
    return by_example(reference.panels(values.flatten(0, 1)), 0, saved.shape[0])


def _side_by_side(spec: LevelSpec, groups: Groups, dims: Groups, size: int, shared: bool) -> list[Any]:
    """The tensors of ``spec.repeated(size, shared)`` from vmapped ones."""
    blocks = (1, *[len(spec.layers)] * 5, 1, 1)
    found = list(groups.inputs) if shared else []
    for ts, own, count in list(zip(groups, dims, blocks, strict=True))[int(shared) :]:
        found += _slices(ts, own, size, count) if ts else []
    return found


def _slices(tensors: Any, dims: Any, size: int, blocks: int) -> list[Tensor | None]:
    """Lists the slices of vmapped tensors example by example, within each of ``blocks`` equal runs of tensors."""
    slices = [copies(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)]
    width = len(slices) // blocks
    return [slices[block * width + i][v] for block in range(blocks) for v in range(size) for i in range(width)]


register_reference(_OP, "forward", reference.forward)
register_reference(_OP, "backward", reference.backward)


def _differentiable_forward(
    inputs: Any, parameters: Any, gates: Any, ints: Any, floats: Any, seed: Any, save: bool
) -> Any:
    # The seed would be drawn again: of what is random PyTorch keeps the results of its own dropout alone.
    budget = 1.0 if seed is None else _torch.memory_budget(inputs)
    if budget < 1:
        raise RuntimeError(
            "dropout: expected an activation_memory_budget of 1 where training is compiled, found"
            f" {budget}, with which the backward pass would drop other values than the forward pass;"
            " torch.utils.checkpoint saves memory too, and is right"
        )
    spec = LevelSpec.decoded(ints, floats)
    results = apply(Level, Plan(spec, None), *inputs, *parameters, *gates, seed)
    outputs, saved = spec.split_results(results)
    return list(results) if save else [*outputs, *spec.split_saved(saved)[1]]


@of_no_examples
def vmap_operator(info: Any, in_dims: Any, *args: Any) -> Any:
    """The operator's own rule, which torch.compile needs where no gradient is wanted."""
    *lists, ints, floats, seed, save = args
    spec = LevelSpec.decoded(ints, floats)

    def run(spec: LevelSpec, *tensors: Any) -> Any:
        args = (*spec.operands(tensors), *spec.encoded, tensors[spec.num_tensors], save)
        return torch.ops.mtlkernels.level_forward(*args)

    dims = [dim for group, ts in zip(in_dims, lists, strict=False) for dim in (group or [None] * len(ts))]
    tensors = [tensor for ts in lists for tensor in ts]
    out, out_dims = _vmap_forward(run, info.batch_size, (*dims, in_dims[5]), spec, (*tensors, seed))
    return list(out), list(out_dims)


torch.library.register_vmap("mtlkernels::level_forward", vmap_operator)
register_autograd("level_forward", _differentiable_forward)
