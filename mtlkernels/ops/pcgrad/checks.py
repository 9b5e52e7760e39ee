"""Checks of PCGrad's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels.ops._checks import DTYPES, check_dense, shape_of
from mtlkernels.ops._layout import first_of
from mtlkernels.ops.pcgrad.sparse import is_sparse


class Options(NamedTuple):
    """What acts on T x T numbers, checked; see :func:`mtlkernels.pcgrad`. All ranks must have the same."""

    include_self: bool
    max_norm: float | None
    normalize: bool
    project: bool
    eps: float
    reduction: str


def check_gradients(grads: Sequence[Any], num_tasks: int, *, dense: bool = False, each: bool = False) -> None:
    """Every gradient is a floating-point tensor, on one device, of its parameter's shape and dtype.

    ``each``: there is one for each parameter.
    """
    try:
        _check_columns(grads, num_tasks, dense, each)
    except RuntimeError:  # a nested tensor has no shape to compare; to ask each whether it is one would take a while
        for at, grad in enumerate(grads):
            if isinstance(grad, Tensor) and grad.is_nested:
                kinds = "dense" if dense else "dense or sparse_coo"
                where = f"grads[{at % num_tasks}][{at // num_tasks}]"
                raise TypeError(f"{where} must be {kinds}, got a nested one") from None
        raise


def _check_columns(grads: Sequence[Any], num_tasks: int, dense: bool, each: bool) -> None:
    first = first_of(grads)
    device = first.device if isinstance(first, Tensor) else None
    for start in range(0, len(grads), num_tasks):
        column = grads[start : start + num_tasks]
        like: Any = first_of(column)
        if each:
            like = any_of_parameter(column, start // num_tasks)
        known = isinstance(like, Tensor) and like.dtype in DTYPES
        shape, dtype = (like.shape, like.dtype) if known else (None, None)
        for t, grad in enumerate(column):
            # Nearly all of them, which may be thousands, are told to be right here.
            if grad is None or (
                known
                and isinstance(grad, Tensor)
                and grad.layout == torch.strided
                and grad.dtype == dtype
                and grad.shape == shape
                and grad.device == device
            ):
                continue
            error = _mistake(grad, device, column, dense)
            if error is not None:
                raise error[0](f"grads[{t}][{start // num_tasks}] must {error[1]}")


def _mistake(grad: Any, device: Any, column: Sequence[Any], dense: bool) -> tuple[type[Exception], str] | None:
    """What is wrong with a gradient on its own, and beside the first ones of its parameter."""
    if not isinstance(grad, Tensor):
        return TypeError, f"be a tensor or None, got {type(grad).__name__}"
    if grad.dtype not in DTYPES:
        return TypeError, f"be float32, bfloat16, float16 or float64, got {grad.dtype}"
    if grad.layout != torch.strided and (dense or grad.layout != torch.sparse_coo):
        return TypeError, f"be dense{'' if dense else ' or sparse_coo'}, got layout {grad.layout}"
    if grad.device != device:
        return ValueError, f"be on {device} as the first gradient is, got {grad.device}"
    like: Any = first_of(column)
    sparse = first_of(grad for grad in column if is_sparse(grad))
    if grad.shape != like.shape:
        return ValueError, f"have shape {shape_of(like)} as other tasks have, got {shape_of(grad)}"
    if grad.dtype != like.dtype:
        return TypeError, f"have dtype {like.dtype} as other tasks have, got {grad.dtype}"
    if grad.sparse_dim() == 0:
        return ValueError, "have at least one sparse dimension, got none"
    if sparse is not None and grad.sparse_dim() != sparse.sparse_dim():
        return ValueError, f"have {sparse.sparse_dim()} sparse dimensions as other tasks have, got {grad.sparse_dim()}"
    if grad.requires_grad and torch.is_grad_enabled():
        return (
            ValueError,
            "not require gradients, as a sparse gradient has no derivative here, got one that does: detach() it",
        )
    return None


def check_flat(grads: Sequence[Any], num_tasks: int, *, each: bool = False) -> None:
    """What a GPU's kernels read addresses of, as operators can be called directly: dense gradients, T a parameter."""
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    if len(grads) % num_tasks:
        raise ValueError(f"grads must hold num_tasks = {num_tasks} entries a parameter, got {len(grads)}")
    check_gradients(grads, num_tasks, dense=True, each=each)


def any_of(grads: Sequence[Tensor | None]) -> Tensor:
    """One of the gradients of a call, by which an operator knows its device."""
    like = first_of(grads)
    if like is None:
        raise ValueError("grads must hold at least one gradient, whose device the matrix is on, got none")
    return like


def any_of_parameter(column: Sequence[Tensor | None], parameter: int) -> Tensor:
    """One of a parameter's gradients, as which its result lies."""
    like = first_of(column)
    if like is None:
        raise ValueError(f"grads must hold a gradient for each parameter, got none for {parameter}")
    return like


def check_coefficients(grads: Sequence[Any], num_tasks: int, coefficients: Tensor) -> None:
    """:func:`check_flat`, with a gradient for each parameter, and T coefficients on the same device."""
    check_flat(grads, num_tasks, each=True)
    if coefficients.shape != (num_tasks,) or coefficients.dtype != torch.float64:
        given = f"{list(coefficients.shape)} in {coefficients.dtype}"
        raise ValueError(f"coefficients must have shape [{num_tasks}] in float64, got {given}")
    like: Any = first_of(grads)  # all are on its device
    if like is not None and like.device != coefficients.device:
        raise ValueError(f"grads must be on {coefficients.device} as coefficients are, got {like.device}")


def check_steps(gram: Tensor, order: Tensor | None) -> None:
    """The Gram matrix, and an order of projections with a row for each task on the same device."""
    check_gram(gram)
    tasks = gram.shape[0]
    if order is not None and (order.dim() != 2 or order.shape[0] != tasks or order.device != gram.device):
        where = f"{list(order.shape)} on {order.device}"
        raise ValueError(f"order must have a row for each of {tasks} tasks on {gram.device}, got {where}")


def check_gram(gram: Any) -> None:
    """A square matrix in float64."""
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram must be a tensor [T, T], got {type(gram).__name__}")
    if gram.dtype != torch.float64:
        raise TypeError(f"gram must be float64, got {gram.dtype}")
    check_dense("gram", gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must have shape [T, T] with T at least 1, got {shape_of(gram)}")


def check_options(
    include_self: Any, max_norm: Any, normalize: Any, project: Any, eps: Any, reduction: Any = "sum"
) -> Options:
    """The options, put together."""
    check_reduction(reduction)
    for name, flag in (("include_self", include_self), ("normalize", normalize), ("project", project)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    for name, value in (("max_norm", 1.0 if max_norm is None else max_norm), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if max_norm is not None and not 0 < max_norm < math.inf:  # comparisons, for torch.compile
        raise ValueError(f"max_norm must be positive and finite, got {max_norm}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    return Options(include_self, max_norm, normalize, project, eps, reduction)


def check_reduction(reduction: Any) -> None:
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be 'sum' or 'mean', got {type(reduction).__name__}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")


def check_order(order: Any, num_tasks: int, device: torch.device) -> Tensor:
    """``order``, which is to be moved to ``device``, as a tensor.

    Entries of lists are always looked at, as they are Python's. Those of a tensor are not on a GPU, where that would
    wait for it, nor of a fake one.
    """
    given = order
    if isinstance(order, (list, tuple)):
        order = _order_of(order, num_tasks)
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a tensor of integers or nested lists of them, got {type(order).__name__}")
    check_dense("order", order)
    if order.is_quantized:
        raise TypeError(f"order must hold integers, got {order.dtype}")
    if order.is_meta and device.type != "meta":
        raise ValueError(f"order must have entries, as on {device}, got one on meta")
    shapes = ((num_tasks, num_tasks - 1), (num_tasks, num_tasks))
    if order.shape not in shapes:
        raise ValueError(f"order must have shape {list(shapes[0])} or {list(shapes[1])}, got {shape_of(order)}")
    if order.numel() and (order.is_floating_point() or order.is_complex() or order.dtype == torch.bool):
        raise TypeError(f"order must hold integers, got {order.dtype}")
    if isinstance(given, (list, tuple)):
        _check_tasks([[int(j) for j in row] for row in given], num_tasks)
    elif order.is_cpu and _may_read(order):
        _check_tasks(order.tolist(), num_tasks)
    return order


def _may_read(order: Tensor) -> bool:
    """Whether a tensor on the CPU has entries: it neither is a fake one nor stands for others in a transform."""
    return not (_torch.compiling() or _torch.func_transforms_active() or isinstance(order, _torch.TRACED))


def _check_tasks(rows: Sequence[Sequence[int]], num_tasks: int) -> None:
    for i, row in enumerate(rows):
        if any(not 0 <= j < num_tasks for j in row):
            raise ValueError(f"order[{i}] must hold tasks in [0, {num_tasks}), got {row}")
        if _repeats(row):
            raise ValueError(f"order[{i}] must hold each task at most once, got {row}")


def _repeats(row: Sequence[int]) -> bool:
    """Whether a task is there twice. To the compiler, what is put into a set is a constant: it would compile anew."""
    if _torch.compiling():
        return any(task in row[:at] for at, task in enumerate(row))
    return len(set(row)) != len(row)


def _order_of(rows: Sequence[Any], num_tasks: int) -> Tensor:
    """Nested lists as a tensor; where PyTorch makes none of them, what is wrong with them."""
    try:
        return torch.tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        for i, row in enumerate(rows):
            if isinstance(row, (str, bytes)) or not isinstance(row, Sequence):
                raise TypeError(f"order[{i}] must be a list of integers, got {type(row).__name__}") from error
            for j in row:
                if isinstance(j, bool) or not isinstance(j, int):
                    raise TypeError(f"order[{i}] must hold integers, got {type(j).__name__}") from error
            if any(not 0 <= j < num_tasks for j in row):
                raise ValueError(f"order[{i}] must hold tasks in [0, {num_tasks}), got {row}") from error
        raise ValueError(f"order must have rows of one length, got {[len(row) for row in rows]}") from error


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def check_group(group: Any) -> None:
    """A process group of torch.distributed, or None."""
    if group is None:
        return
    if not torch.distributed.is_available():
        raise TypeError("group must be None, as this PyTorch is built without torch.distributed")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
