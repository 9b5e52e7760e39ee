"""The gradients of a call, sorted by what handles them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._call import needs_function
from mtlkernels.ops.pcgrad.checks import check_columns, columns_of
from mtlkernels.ops.pcgrad.sparse import SparseColumn, is_sparse


class Parameters:
    """T gradients for each of P parameters, checked.

    Dense ones go to the operators, all in one call, and with them what :class:`SparseColumn` makes of the others; a
    parameter without any gradient is left out.
    """

    def __init__(self, grads: Any) -> None:
        self.num_tasks, self.columns = columns_of(grads)
        check_columns(self.columns)
        self.dense: list[int] = []
        self.sparse: dict[int, SparseColumn] = {}
        for p, column in enumerate(self.columns):
            if any(is_sparse(grad) for grad in column):
                self.sparse[p] = SparseColumn(column)
            elif any(grad is not None for grad in column):
                self.dense.append(p)
        self._flat: list[Tensor | None] = [grad for p in self.dense for grad in self.columns[p]]

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
        if needs_function(flat, args):
            return _backends.reference_implementation("pcgrad", direction)(flat, self.num_tasks, *args)
        like = next(grad for grad in flat if grad is not None)
        run = _backends.implementation("pcgrad", direction, _backends.forced(), like)
        return run(flat, self.num_tasks, *args)
