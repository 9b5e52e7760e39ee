"""What the ops' autograd Functions share: second derivatives and rules for vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels.ops._call import apply


def differentiate_twice(
    forward: Callable[..., Any], primals: Sequence[Tensor], grad_outputs: Sequence[Tensor], grads: Sequence[Any]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The vector-Jacobian product of a backward pass, by PyTorch's own derivatives of the reference ``forward``.

    Args:
        forward: a function of ``primals`` that returns a tuple of tensors.
        primals: its arguments.
        grad_outputs: the gradients that the backward pass received.
        grads: the gradients of what it returned, one a primal; None where there is none.

    Returns:
        The gradients of ``grad_outputs`` and those of ``primals``.
    """

    vjp: Any = torch.func.vjp  # annotated in torch as if it always returned three values

    def backward(outs: tuple[Tensor, ...], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, pull = vjp(forward, *args)
        return tuple(pull(outs))

    with _torch.without_hooks_on_saved():  # within which PyTorch refuses transforms
        result, pull = vjp(backward, tuple(grad_outputs), tuple(primals))
        cotangents = tuple(
            torch.zeros_like(out) if grad is None else grad.to(out.dtype)
            for out, grad in zip(result, grads, strict=True)
        )
        grad_grad_outputs, grad_primals = pull(cotangents)
    return tuple(grad_grad_outputs), tuple(grad_primals)


def front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``tensor`` with its vmapped dimension first, expanded where it has none."""
    if dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def copies(tensor: Tensor | None, dim: int | None, size: int) -> list[Tensor | None]:
    """One slice of a vmapped tensor per example; the same tensor again and again where it is not vmapped."""
    if tensor is None or dim is None:
        return [tensor] * size
    return list(tensor.unbind(dim))


def example_by_example(run: Callable[..., Any], size: int, in_dims: Any, tensors: Any) -> Any:
    """A rule for vmap that calls ``run`` with each example: where each has statistics, a seed or gates of its own."""
    slices = [copies(tensor, dim, size) for tensor, dim in zip(tensors, in_dims, strict=True)]
    results = [run(*example) for example in zip(*slices, strict=True)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def by_example(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Splits dimension ``dim``, in which ``size`` examples lie one after another."""
    split: Tensor = tensor.unflatten(dim, (size, tensor.shape[dim] // size))
    return split


@dataclass(frozen=True)
class _Examples:
    """What a Function's vmap rule reads of its ``info``."""

    batch_size: int


def of_no_examples(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for vmap that needs an example, made to serve none as well: by one of zeros, which is dropped again."""

    @functools.wraps(rule)
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if info.batch_size:
            return rule(info, in_dims, *args)
        results, dims = rule(_Examples(1), in_dims, *map(_of_zeros, args, in_dims))
        return _none_of(results, dims), dims

    return vmap


def _of_zeros(value: Any, dim: Any) -> Any:
    """With one example of zeros instead of none, in lists too."""
    if isinstance(value, list) and dim is not None:
        return [_of_zeros(part, own) for part, own in zip(value, dim, strict=True)]
    if not isinstance(value, Tensor) or dim is None:
        return value
    return value.new_zeros((*value.shape[:dim], 1, *value.shape[dim + 1 :]))


def _none_of(value: Any, dim: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_none_of(part, own) for part, own in zip(value, dim, strict=True))
    return value if dim is None else value.narrow(dim, 0, 0)


def call(function: Any, *args: Any) -> Any:
    """Applies a backward Function, or runs it plainly where nobody will differentiate it again.

    While compiling it is traced plainly: compiled code has no second derivatives. Of gradients that carry tangents
    PyTorch says that a Function has none, where plainly run operators would drop them.
    """
    if _torch.compiling():
        return function.forward(*args)
    if not (torch.is_grad_enabled() or _torch.func_transforms_active() or _torch.in_dual_level()):
        return function.forward(*args)
    return apply(function, *args)


def grads_are_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether ``torch.autograd.grad(..., is_grads_batched=True)`` is at work, which is not torch.func's vmap."""
    if _torch.compiling():
        return False
    return any(grad is not None and _torch.is_legacy_batched_tensor(grad) for grad in grads)


def batched_backward(function: Any, static: Sequence[Any], tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """Runs a backward Function under ``is_grads_batched`` by its own rule for vmap."""
    level = _torch.legacy_vmap_level([tensor for tensor in tensors if tensor is not None])
    is_batched = [tensor is not None and _torch.has_legacy_level(tensor, level) for tensor in tensors]
    physical = [
        _torch.remove_batch_dim(t, level, 0, 0) if batched else t
        for t, batched in zip(tensors, is_batched, strict=True)
    ]
    size = next(t.shape[0] for t, batched in zip(physical, is_batched, strict=True) if batched)
    in_dims = (*(None for _ in static), *(0 if batched else None for batched in is_batched))
    results, out_dims = function.vmap(_Examples(size), in_dims, *static, *physical)
    return tuple(_torch.add_batch_dim(t, dim, level) for t, dim in zip(results, out_dims, strict=True))
