"""The gradients of a call on one machine, sorted by what handles them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtlkernels import _backends, _decisions
from mtlkernels.ops._call import direct_to_cpp, needs_function, needs_plain, run_cpp, run_operator, traced_under_func
from mtlkernels.ops._layout import first_of
from mtlkernels.ops.pcgrad.checks import check_gradients
from mtlkernels.ops.pcgrad.sparse import SparseColumn, is_sparse

Result = TypeVar("Result")


class Parameters:
    """T gradients for each of P parameters, checked; that of task t for parameter p is ``grads[p * T + t]``.

    Dense ones go to the operators, all in one call, and with them what :class:`SparseColumn` makes of the others; a
    parameter without any gradient is left out. Where all go to the C++ operators, these check them: thousands of
    tensors take Python milliseconds. When they refuse, the checks in Python find out why, in the caller's terms. They
    come first where the reference serves, which checks nothing, and with ``at_once``, which ranks need that must agree
    before they compute.

    Attributes:
        device: where the gradients are; the CPU where there are none.
    """

    def __init__(self, grads: Sequence[Tensor | None], num_tasks: int, *, at_once: bool = False) -> None:
        self.grads, self.num_tasks = grads, num_tasks
        present = [grad for grad in grads if grad is not None]
        tensors = all(issubclass(kind, Tensor) for kind in set(map(type, present)))
        mixed = tensors and not set(map(attrgetter("layout"), present)) <= {torch.strided}
        self._checked = at_once or not tensors or mixed or not direct_to_cpp(present[0] if present else None)
        if self._checked:
            check_gradients(grads, num_tasks)
        self.device = present[0].device if present else torch.device("cpu")
        self.sparse: dict[int, SparseColumn] = {}
        # The parameters with dense gradients alone, and these.
        self._dense, self._flat = list(range(len(grads) // num_tasks)), list(grads)
        if mixed or len(present) < len(grads):
            self._dense, self._flat = [], []
            for p in range(len(grads) // num_tasks):
                column = self.column(p)
                if mixed and any(is_sparse(grad) for grad in column):
                    self.sparse[p] = SparseColumn(column)
                elif first_of(column) is not None:
                    self._dense.append(p)
                    self._flat += column
        self._in_pytorch = traced_under_func("pcgrad") or needs_plain("pcgrad") or needs_function(self._flat)
        if self._in_pytorch and not self._checked:
            check_gradients(grads, num_tasks)
            self._checked = True

    def column(self, parameter: int) -> Sequence[Tensor | None]:
        """One parameter's gradients."""
        return self.grads[parameter * self.num_tasks : (parameter + 1) * self.num_tasks]

    def gram(self) -> Tensor:
        """[T, T] in float64."""
        flat = [*self._flat, *(grad for sparse in self.sparse.values() for grad in sparse.for_gram())]
        if not flat:
            return torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64)
        gram: Tensor = self._run("gram", flat)
        for sparse in self.sparse.values():
            if sparse.dense or not sparse.aligned:
                gram = gram + sparse.cross()
        return gram

    def agreed(self, coefficients: Tensor) -> Tensor:
        """The coefficients that all ranks use, from this rank's: there is no other."""
        return coefficients

    def succeed_together(self, function: Callable[[], Result]) -> Result:
        """Calls what may fail on some ranks; here there is one."""
        return function()

    def combine(self, coefficients: Tensor) -> list[Tensor | None]:
        """The sum over tasks of coefficient times gradient, for each parameter."""
        results: list[Tensor | None] = [None] * (len(self.grads) // self.num_tasks)
        columns = {p: sparse.for_combine() for p, sparse in self.sparse.items()}
        flat = [*self._flat, *(grad for column in columns.values() for grad in column)]
        if flat:
            places = [*self._dense, *(p for p, column in columns.items() if column)]
            for p, result in zip(places, self._run("combine", flat, coefficients), strict=True):
                results[p] = result
        for p, sparse in self.sparse.items():
            results[p] = sparse.combine(coefficients, results[p])
        return results

    def _run(self, direction: str, flat: Sequence[Tensor | None], *args: Tensor) -> Any:
        """Runs one of the operators, by the reference where a derivative or torch.func wants to see inside."""
        if self._in_pytorch or needs_function(args):
            reason = "a derivative is wanted, or a tracer or a transform looks on"
            _decisions.note("pcgrad", "reference", reason, first_of(flat), direction=direction)
            return _backends.reference_implementation("pcgrad", direction)(flat, self.num_tasks, *args)
        if not self._checked:
            try:
                found = run_cpp("pcgrad", direction, flat, self.num_tasks, *args)
                if _decisions.on:
                    reason = "nothing stands in the way of the direct call of C++"
                    _decisions.note("pcgrad", "cpp", reason, first_of(flat), direction=direction)
                return found
            except (TypeError, ValueError):
                check_gradients(self.grads, self.num_tasks)
                self._checked = True  # nothing is wrong with them but that some are of a subclass
        like = next(grad for grad in flat if grad is not None)
        return run_operator("pcgrad", direction, _backends.forced(), like, flat, self.num_tasks, *args)
