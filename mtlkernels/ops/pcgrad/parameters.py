"""The gradients of a call, sorted by what handles them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._call import direct_to_cpp, needs_function, needs_plain, run_cpp, run_operator, traced_under_func
from mtlkernels.ops.pcgrad.checks import check_columns, columns_of
from mtlkernels.ops.pcgrad.sparse import SparseColumn, is_sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Gradients(Protocol):
    """T gradients for each of P parameters: on one machine, or spread over several."""

    num_tasks: int

    @property
    def device(self) -> torch.device: ...

    def gram(self) -> Tensor: ...

    def agreed(self, coefficients: Tensor) -> Tensor:
        """The coefficients that all ranks use, from this rank's."""
        ...

    def combine(self, coefficients: Tensor) -> list[Tensor | None]: ...


class Parameters:
    """T gradients for each of P parameters, checked.

    Dense ones go to the operators, all in one call, and with them what :class:`SparseColumn` makes of the others; a
    parameter without any gradient is left out. Where all go to the C++ operators, these check them: thousands of
    tensors take Python milliseconds. When they refuse, the checks in Python find out why, in the caller's terms. With
    ``at_once``, which ranks need that must agree before they compute, they come first in any case.
    """

    def __init__(self, grads: Any, *, at_once: bool = False) -> None:
        self.num_tasks, self.columns = columns_of(grads)
        first = next(_present(self.columns), None)
        tensors = all(isinstance(grad, Tensor) for grad in _present(self.columns))
        mixed = tensors and any(grad.layout != torch.strided for grad in _present(self.columns))
        self._checked = at_once or not tensors or mixed or not direct_to_cpp(first)
        if self._checked:
            check_columns(self.columns)
        self.dense: list[int] = []
        self.sparse: dict[int, SparseColumn] = {}
        for p, column in enumerate(self.columns):
            if mixed and any(is_sparse(grad) for grad in column):
                self.sparse[p] = SparseColumn(column)
            elif any(grad is not None for grad in column):
                self.dense.append(p)
        self._flat: list[Tensor | None] = [grad for p in self.dense for grad in self.columns[p]]
        self._in_pytorch = traced_under_func("pcgrad") or needs_plain("pcgrad") or needs_function(self._flat)

    @property
    def device(self) -> torch.device:
        """Where the gradients are; the CPU where there are none."""
        found = (grad.device for column in self.columns for grad in column if grad is not None)
        return next(found, torch.device("cpu"))

    def gram(self) -> Tensor:
        """[T, T] in float64."""
        flat = list(self._flat)
        for sparse in self.sparse.values():
            flat += sparse.for_gram()
        if not flat:
            return torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64)
        found: Tensor = self._run("gram", flat)
        for sparse in self.sparse.values():
            if sparse.dense or not sparse.aligned:
                found = found + sparse.cross()
        return found

    def agreed(self, coefficients: Tensor) -> Tensor:
        return coefficients

    def combine(self, coefficients: Tensor) -> list[Tensor | None]:
        """The sum over tasks of coefficient times gradient, for each parameter."""
        results: list[Tensor | None] = [None] * len(self.columns)
        flat, places = list(self._flat), list(self.dense)
        for p, sparse in self.sparse.items():
            column = sparse.for_combine()
            if column:
                flat += column
                places.append(p)
        if flat:
            combined = self._run("combine", flat, coefficients)
            for p, result in zip(places, combined, strict=True):
                results[p] = result
        for p, sparse in self.sparse.items():
            results[p] = sparse.combine(coefficients, results[p])
        return results

    def _run(self, direction: str, flat: Sequence[Tensor | None], *args: Tensor) -> Any:
        """Runs one of the operators, by the reference where a derivative or torch.func wants to see inside."""
        if self._in_pytorch or needs_function(args):
            return _backends.reference_implementation("pcgrad", direction)(flat, self.num_tasks, *args)
        if not self._checked:
            try:
                return run_cpp("pcgrad", direction, flat, self.num_tasks, *args)
            except (TypeError, ValueError):
                check_columns(self.columns)
                self._checked = True  # nothing is wrong with them but that some are of a subclass
        like = next(grad for grad in flat if grad is not None)
        return run_operator("pcgrad", direction, _backends.forced(), like, flat, self.num_tasks, *args)


def _present(columns: Sequence[Sequence[Tensor | None]]) -> Iterator[Tensor]:
    return (grad for column in columns for grad in column if grad is not None)


def rows_of(columns: Sequence[Sequence[Tensor | None]], num_tasks: int) -> list[list[Tensor | None]]:
    """Gradients by task, as :class:`Parameters` takes them, from gradients by parameter."""
    return [[column[t] for column in columns] for t in range(num_tasks)]


def dtensor_class() -> Any:
    """DTensor, or None if nothing has imported it: then there are none, and this does not import it either."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def collect(grads: Any, group: ProcessGroup | None) -> Gradients:
    """This rank's gradients, checked. Those of a group go on to :func:`over`."""
    dtensor = dtensor_class()
    if dtensor is not None and any(isinstance(grad, dtensor) for grad in _tensors(grads)):
        if group is not None:
            raise ValueError("group must be None where gradients are DTensors, which know their ranks, got a group")
        from mtlkernels.ops.pcgrad.distributed.sharded import Sharded

        return Sharded(grads)
    found = Parameters(grads, at_once=group is not None)
    if group is not None and torch.is_grad_enabled() and any(grad.requires_grad for grad in _tensors(grads)):
        raise ValueError("grads must not require gradients where group is given: their mean has no derivative here")
    return found


def _tensors(grads: Any) -> list[Tensor]:
    """The tensors in ``grads``, whatever it is: nothing is checked here."""
    if isinstance(grads, Tensor):
        return [grads]
    rows = grads if isinstance(grads, (list, tuple, torch.nn.ParameterList)) else ()
    rows = [row for row in rows if isinstance(row, (list, tuple, torch.nn.ParameterList))]
    return [grad for row in rows for grad in row if isinstance(grad, Tensor)]


def over(group: ProcessGroup | None, gradients: Gradients, options: dict[str, Any]) -> Gradients:
    """The mean over the ranks of a group, all of which must have the same ``options``."""
    if group is None or group.size() == 1:
        return gradients
    from mtlkernels.ops.pcgrad.distributed.data_parallel import DataParallel

    assert isinstance(gradients, Parameters)
    return DataParallel(gradients, group, options)


def together(group: ProcessGroup | None, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Calls what comes before :func:`over`; where a group is given, an exception becomes one on every rank of it."""
    if group is None or group.size() == 1:
        return function(*args, **kwargs)
    from mtlkernels.ops.pcgrad.distributed import agreement

    return agreement.together(group, function, *args, **kwargs)
