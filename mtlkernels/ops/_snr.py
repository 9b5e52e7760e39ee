"""What SNR-Trans and SNR-Aver share: derivatives of every order, rules for vmap, checks.

Both take tensors in groups: the sub-networks' outputs u, the weights (Trans alone), and z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels import _backends, _decisions, _extension, _torch
from mtlkernels._backends import implementation, register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import (
    batched_backward,
    by_example,
    call,
    copies,
    differentiate_twice,
    front,
    grads_are_batched,
    of_no_examples,
)
from mtlkernels.ops._call import apply, direct_to_cpp
from mtlkernels.ops._checks import as_sequence, check_like, check_tensor, shape_of
from mtlkernels.ops.gated_mixture.reference import accumulation_dtype

# op -> the forward pass that second derivatives are taken of: a function of the groups of tensors.
_formulas: dict[str, Callable[..., tuple[Tensor, ...]]] = {}


@dataclass(frozen=True)
class Plan:
    """What is static about a call: the op, how many tensors there are of each kind, and how to run it."""

    op: str
    num_inputs: int
    num_weights: int
    num_outputs: int
    closed_grad: bool
    backend: str | None

    def groups(self, tensors: Any) -> list[Any]:
        """``(*u, *weights, z)`` as the operators take them; the last group is z itself."""
        a, b = self.num_inputs, self.num_inputs + self.num_weights
        return [tensors[:a], *([tensors[a:b]] if self.num_weights else []), tensors[b]]

    def of_outputs(self, outputs: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Plan, list[Tensor]]:
        """The call of these outputs alone, and its tensors."""
        *lists, z = self.groups(tensors)
        weights: list[Tensor] = []
        if self.stacked:
            weights = [_rows_of(lists[1][0], outputs)]
        elif self.num_weights:
            weights = [lists[1][at] for at in self._matrices(outputs)]
        plan = replace(self, num_outputs=len(outputs), num_weights=len(weights))
        return plan, [*lists[0], *weights, _rows_of(z, outputs)]

    def into_whole(self, outputs: Sequence[int], needs: Sequence[bool], found: Sequence[Tensor]) -> list[Tensor | None]:
        """From the gradients of such a call to those of this one: None for matrices, and zeros for rows, of others."""
        given = iter(found)
        result: list[Tensor | None] = [next(given) if needs[0] else None for _ in range(self.num_inputs)]
        if self.stacked:
            result.append(self._placed(outputs, next(given)) if needs[1] else None)
        elif self.num_weights:
            ours = self._matrices(outputs) if needs[1] else []
            of_matrices = {at: next(given) for at in ours}
            result += [of_matrices.get(at) for at in range(self.num_weights)]
        return [*result, self._placed(outputs, next(given)) if needs[-1] else None]

    @property
    def stacked(self) -> bool:
        """Whether all weights are one tensor [I, J, D_out, D_in]; one matrix alone may be either."""
        return self.num_weights == 1 < self.num_outputs * self.num_inputs

    def _matrices(self, outputs: Sequence[int]) -> list[int]:
        return [i * self.num_inputs + j for i in outputs for j in range(self.num_inputs)]

    def _placed(self, outputs: Sequence[int], rows: Tensor) -> Tensor:
        """Rows of the outputs among zeros for the others."""
        given, zeros = dict(zip(outputs, rows.unbind(0), strict=True)), rows.new_zeros(rows.shape[1:])
        return torch.stack([given.get(i, zeros) for i in range(self.num_outputs)])


def _rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows, not by a tensor of their numbers: a GPU would wait for that."""
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return tensor.narrow(0, first, count)
    return torch.stack([tensor[i] for i in rows])


class Routes(torch.autograd.Function):
    """``apply(plan, *u, *weights, z)`` -> I outputs."""

    @staticmethod
    def forward(plan: Plan, *tensors: Tensor) -> Any:
        run = implementation(plan.op, "forward", plan.backend, tensors[0])
        return tuple(run(*plan.groups(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, *tensors = inputs
        if not _torch.compiling():  # which does not trace it
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        *lists, z = plan.groups(ctx.needs_input_grad[1:])
        needs = (*map(any, lists), z)
        if len(used) == len(grads):
            found = iter(call(RoutesBackward, plan, needs, *grads, *ctx.saved_tensors))
            of_lists = zip(lists, needs[:-1], strict=True)
            result = [next(found) if need else None for flags, need in of_lists for _ in flags]
            return (None, *result, next(found) if z else None)
        part, tensors = plan.of_outputs(used, ctx.saved_tensors)
        found = call(RoutesBackward, part, needs, *(grads[i] for i in used), *tensors)
        return (None, *plan.into_whole(used, needs, found))

    @staticmethod
    @of_no_examples
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Tensor) -> Any:
        return _vmap_forward(lambda *args: Routes.apply(plan, *args), info.batch_size, in_dims[1:], plan, tensors)


class RoutesBackward(torch.autograd.Function):
    """``apply(plan, needs, *grad_outputs, *u, *weights, z)`` -> the gradients wanted, in the order of the groups."""

    @staticmethod
    def forward(plan: Plan, needs: tuple[bool, ...], *tensors: Tensor) -> Any:
        grad_outputs, primals = tensors[: plan.num_outputs], tensors[plan.num_outputs :]
        if grads_are_batched(grad_outputs):
            return batched_backward(RoutesBackward, (plan, needs), tensors)
        run = implementation(plan.op, "backward", plan.backend, primals[0])
        return tuple(run(grad_outputs, *plan.groups(primals), *needs, plan.closed_grad))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.plan, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        plan: Plan = ctx.plan
        tensors = ctx.saved_tensors
        grad_outputs, primals = tensors[: plan.num_outputs], tensors[plan.num_outputs :]
        found = iter(grads)
        wanted: list[Tensor | None] = []
        for group, need in zip(plan.groups(primals)[:-1], ctx.needs[:-1], strict=True):
            wanted += [next(found) if need else None for _ in group]
        grad_z = next(found) if ctx.needs[-1] else None

        def forward(*values: Tensor) -> tuple[Tensor, ...]:
            *rest, gates = values
            if not plan.closed_grad:
                gates = torch.where(gates != 0, gates, gates.detach())
            return _formulas[plan.op](*plan.groups((*rest, gates)))

        grad_grads, grad_primals = differentiate_twice(forward, primals, grad_outputs, [*wanted, grad_z])
        return (None, None, *grad_grads, *grad_primals)

    @staticmethod
    @of_no_examples
    def vmap(info: Any, in_dims: Any, plan: Plan, needs: Any, *tensors: Tensor) -> Any:
        return _one_by_one(
            lambda *args: RoutesBackward.apply(plan, needs, *args), info.batch_size, in_dims[2:], tensors
        )


def _vmap_forward(run: Callable[..., Any], size: int, in_dims: Any, plan: Plan, tensors: Any) -> Any:
    """Examples become rows where they share weights and z, and calls otherwise."""
    inputs = plan.num_inputs
    if any(dim is not None for dim in in_dims[inputs:]):
        return _one_by_one(run, size, in_dims, tensors)
    rows = [front(t, dim, size).flatten(0, 1) for t, dim in zip(tensors[:inputs], in_dims[:inputs], strict=True)]
    out = run(*rows, *tensors[inputs:])
    return tuple(by_example(v, 0, size) for v in out), (0,) * len(out)


def _one_by_one(run: Callable[..., Any], size: int, in_dims: Any, tensors: Any) -> Any:
    """A call an example."""
    slices = [copies(tensor, dim, size) for tensor, dim in zip(tensors, in_dims, strict=True)]
    out = tuple(
        torch.stack(results) for results in zip(*(run(*args) for args in zip(*slices, strict=True)), strict=True)
    )
    return out, (0,) * len(out)


def register(op: str, reference: Any) -> None:
    """Makes a module's ``forward``, ``backward`` and ``formula`` the op's, with its derivative and rule for vmap."""
    register_reference(op, "forward", reference.forward)
    register_reference(op, "backward", reference.backward)
    _formulas[op] = reference.formula

    def plan_of(*groups: Any) -> Plan:
        *lists, z = groups
        return Plan(op, len(lists[0]), len(lists[1]) if len(lists) > 1 else 0, z.shape[-2], True, None)

    def differentiable(*groups: Any) -> list[Tensor]:
        flat = [tensor for group in groups[:-1] for tensor in group]
        return list(apply(Routes, plan_of(*groups), *flat, groups[-1]))

    def rule(info: Any, in_dims: Any, *groups: Any) -> Any:
        """The operator's own rule, which torch.compile needs where no gradient is wanted."""
        plan = plan_of(*groups)
        flat = [tensor for group in groups[:-1] for tensor in group]
        dims = [d for group, dim in zip(groups[:-1], in_dims, strict=False) for d in (dim or [None] * len(group))]
        operator = getattr(torch.ops.mtlkernels, f"{op}_forward")
        out, out_dims = _vmap_forward(
            lambda *args: operator(*plan.groups(args)), info.batch_size, (*dims, in_dims[-1]), plan, (*flat, groups[-1])
        )
        return list(out), list(out_dims)

    register_autograd(f"{op}_forward", differentiable)
    torch.library.register_vmap(f"mtlkernels::{op}_forward", of_no_examples(rule))


def direct(op: str, u: Any, weight: Any, z: Any, closed_grad: bool) -> tuple[Tensor, ...] | None:
    """Calls on a CPU past the checks in Python and the Function, which would take as long as a small batch.

    Goes straight to C++, which checks what it is given before it computes. Returns None where this does not apply, and
    where C++ refuses: the checks in Python then find out why, in the caller's terms.
    """
    several = isinstance(u, (list, tuple))
    first: Any = u[0] if several and u else u
    if not direct_to_cpp(first) or (not several and (first.is_nested or first.dim() != 3)):
        return None
    streams, transforms, by_name = u if several else u.unbind(0), op == "snr_trans", _backends.forced() is not None
    found: tuple[Tensor, ...] | None = _extension.function("routes")(
        transforms, streams, weight, z, closed_grad, by_name
    )
    if found is not None and _decisions.on:
        rows = first.shape[0 if several else 1]
        _decisions.note(op, "cpp", "nothing stands in the way of the direct call of C++", first, rows, "forward")
    return found


def gradients_of_node(
    op: str,
    num_inputs: int,
    num_outputs: int,
    closed_grad: bool,
    by_name: bool,
    needs: Sequence[bool],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> Any:
    """What C++ asks of the backward pass of its node where somebody looks on."""
    num_weights = len(tensors) - num_inputs - 1
    plan = Plan(op, num_inputs, num_weights, num_outputs, closed_grad, "cpp" if by_name else None)
    ctx = SimpleNamespace(plan=plan, needs_input_grad=(False, *needs), saved_tensors=tuple(tensors))
    return Routes.backward(ctx, *grads)[1:]


def traced(op: str, closed_grad: bool, *groups: Any) -> tuple[Tensor, ...]:
    """The formula, where torch.compile traces a torch.func transform; see ``traced_under_func``."""
    *lists, z = groups
    if not closed_grad:
        z = torch.where(z != 0, z, z.detach())
    return _formulas[op](*lists, z)


def as_exported(z: Tensor, closed_grad: bool) -> Tensor:
    """``z`` for an operator in an exported program, whose own derivative knows of no ``closed_grad``."""
    if closed_grad or not (_torch.exporting() and z.requires_grad and torch.is_grad_enabled()):
        return z
    return torch.where(z != 0, z, z.detach())


def of_route(z: Tensor, tensor: Tensor) -> Tensor:
    """What a route reads where derivatives of it are taken: if it is closed, nothing that is not finite."""
    return torch.where((z != 0) | torch.isfinite(tensor), tensor, torch.zeros_like(tensor))


def plain(
    closed_grad: bool, u: Sequence[Tensor], matrices: Sequence[Tensor] | None, z: Tensor, num_outputs: int
) -> tuple[Tensor, ...]:
    """Every route by PyTorch's own operators, which z alone opens and closes, so that a graph holds for any z.

    Where a route is closed, what is not finite is left out; its z has a derivative, unless ``closed_grad`` is False.
    """
    acc, count = accumulation_dtype(u[0]), len(u)
    is_open = z != 0
    if not closed_grad:
        z = torch.where(is_open, z, z.detach())
    outputs = []
    for i in range(num_outputs):
        total: Any = 0
        for j, x in enumerate(u):
            term = x
            if matrices is not None:  # gradients multiply with both
                term = F.linear(*(of_route(z[i, j], t) for t in (x, matrices[i * count + j])))
            total = total + z[i, j].to(acc) * of_route(z[i, j], term.to(acc))
        outputs.append(total.to(u[0].dtype))
    return tuple(outputs)


def check_inputs(u: Any) -> list[Tensor]:
    """The J sub-networks' outputs, from a sequence of them or from one tensor [J, B, D_in]."""
    if isinstance(u, Tensor):
        check_tensor("u", u, 3, "[J, B, D_in]")
        if u.shape[0] == 0:
            raise ValueError(f"u must hold the output of at least one sub-network, got {shape_of(u)}")
        return list(u.unbind(0))
    inputs = list(as_sequence("u", u, "a tensor [J, B, D_in] or a sequence of J tensors [B, D_in]"))
    if not inputs:
        raise ValueError("u must hold the output of at least one sub-network, got none")
    for j, x in enumerate(inputs):
        check_tensor(f"u[{j}]", x, 2, "[B, D_in]")
        check_like(f"u[{j}]", x, "u[0]", inputs[0])
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"u[{j}] must have as many rows as u[0], {inputs[0].shape[0]}, got {shape_of(x)}")
    return inputs


def check_z(z: Any, num_outputs: int | None, inputs: Sequence[Tensor]) -> None:
    """z is [I, J], on the device of ``u``; of any of the four dtypes, float64 only beside float64."""
    columns = len(inputs)
    check_tensor("z", z, 2, f"[I, {columns}]")
    rows = z.shape[0] if num_outputs is None else num_outputs
    if z.shape[1] != columns or z.shape[0] != rows or rows == 0:
        raise ValueError(
            f"z must have shape [{'I' if num_outputs is None else rows}, {columns}], a row for each output and a column"
            f" for each tensor in u, got {shape_of(z)}"
        )
    if z.device != inputs[0].device:
        raise ValueError(f"z must be on the device of u, {inputs[0].device}, got {z.device}")
    if z.dtype == torch.float64 and inputs[0].dtype != torch.float64:
        raise TypeError(f"z must be float32 or narrower beside u in {inputs[0].dtype}, got {z.dtype}")


def check_closed_grad(closed_grad: Any) -> None:
    if not isinstance(closed_grad, bool):
        raise TypeError(f"closed_grad must be True or False, got {type(closed_grad).__name__}")
