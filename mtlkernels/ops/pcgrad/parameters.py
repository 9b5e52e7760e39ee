"""The gradients of a call on one machine, sorted by what handles them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtlkernels import _backends, _decisions, _extension
from mtlkernels.ops._call import (
    direct_to_cpp,
    needs_function,
    needs_plain,
    needs_reference,
    run_operator,
    traced_under_func,
)
from mtlkernels.ops._layout import first_of
from mtlkernels.ops.pcgrad.checks import check_gradients
from mtlkernels.ops.pcgrad.sparse import SparseColumn, is_sparse

Result = TypeVar("Result")


class Parameters:
    """T gradients for each of P parameters, checked; that of task t for parameter p is ``grads[p * T + t]``.

    Where all are plain dense tensors on the CPU, and nobody looks on, C++ reads and checks them once for both passes:
    thousands of tensors take Python milliseconds. Otherwise, and where C++ refuses them, the checks in Python find out
    why, in the caller's terms; they come first with ``at_once``, which ranks need that must agree before they compute.
    Dense ones then go to the operators, all in one call, and with them what :class:`SparseColumn` makes of the others;
    a parameter without any gradient is left out.

    Attributes:
        device: where the gradients are; the CPU where there are none.
    """

    def __init__(self, grads: Sequence[Tensor | None], num_tasks: int, *, at_once: bool = False) -> None:
        self.grads, self.num_tasks = grads, num_tasks
        first = first_of(grads)
        self._lists = None
        if not at_once and _extension.has_module() and direct_to_cpp(first):
            self._lists = _extension.function("gradient_lists")(grads, num_tasks)
        if self._lists is not None:
            self.device = torch.device("cpu")
            self.sparse: dict[int, SparseColumn] = {}
        else:
            self._sort()

    def _sort(self) -> None:
        """Checks the gradients and finds out what handles them."""
        grads, num_tasks = self.grads, self.num_tasks
        check_gradients(grads, num_tasks)
        present = [grad for grad in grads if grad is not None]
        mixed = not set(map(attrgetter("layout"), present)) <= {torch.strided}
        self.device = present[0].device if present else torch.device("cpu")
        self.sparse = {}
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
        self._in_pytorch = traced_under_func("pcgrad") or needs_plain("pcgrad") or needs_reference("pcgrad", grads)

    def column(self, parameter: int) -> Sequence[Tensor | None]:
        """One parameter's gradients."""
        return self.grads[parameter * self.num_tasks : (parameter + 1) * self.num_tasks]

    def gram(self) -> Tensor:
        """[T, T] in float64."""
        if self._lists is not None:
            self._note_direct("gram")
            found: Tensor = _extension.function("gram_of_lists")(self._lists)
            return found
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
        if self._lists is not None:
            if direct_to_cpp(coefficients) and not needs_function((coefficients,)):
                self._note_direct("combine")
                sums: list[Tensor | None] = _extension.function("combine_lists")(self._lists, coefficients)
                return sums
            self._sort()
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

    def _note_direct(self, direction: str) -> None:
        if _decisions.on:
            reason = "nothing stands in the way of the direct call of C++"
            _decisions.note("pcgrad", "cpp", reason, first_of(self.grads), direction=direction)

    def _run(self, direction: str, flat: Sequence[Tensor | None], *args: Tensor) -> Any:
        """Runs one of the operators, by the reference where a derivative or torch.func wants to see inside."""
        if self._in_pytorch or needs_reference("pcgrad", args):
            reason = "a derivative is wanted, or a tracer or a transform looks on"
            _decisions.note("pcgrad", "reference", reason, first_of(flat), direction=direction)
            return _backends.reference_implementation("pcgrad", direction)(flat, self.num_tasks, *args)
        like = next(grad for grad in flat if grad is not None)
        return run_operator("pcgrad", direction, _backends.forced(), like, flat, self.num_tasks, *args)
