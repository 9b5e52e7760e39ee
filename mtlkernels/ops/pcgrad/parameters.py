"""The gradients of a call, sorted by what handles them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._call import needs_function
from mtlkernels.ops.pcgrad.checks import check_columns, columns_of


class Parameters:
    """T gradients for each of P parameters, checked.

    Dense ones go to the operators, all in one call; a parameter without any gradient is left out.
    """

    def __init__(self, grads: Any) -> None:
        self.num_tasks, self.columns = columns_of(grads)
        check_columns(self.columns)
        self.dense = [p for p, column in enumerate(self.columns) if any(grad is not None for grad in column)]
        self._flat = [grad for p in self.dense for grad in self.columns[p]]

    @property
    def device(self) -> torch.device:
        """Where the gradients are; the CPU where there are none."""
        return next((grad.device for grad in self._flat if grad is not None), torch.device("cpu"))

    def gram(self) -> Tensor:
        """[T, T] in float64."""
        if not self._flat:
            return torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64)
        found: Tensor = self._run("gram", self._flat)
        return found

    def combine(self, coefficients: Tensor) -> list[Tensor | None]:
        """The sum over tasks of coefficient times gradient, for each parameter."""
        results: list[Tensor | None] = [None] * len(self.columns)
        if self._flat:
            combined = self._run("combine", self._flat, coefficients)
            for p, result in zip(self.dense, combined, strict=True):
                results[p] = result
        return results

    def _run(self, direction: str, flat: Sequence[Tensor | None], *args: Tensor) -> Any:
        """Runs one of the operators, by the reference where a derivative or torch.func wants to see inside."""
        if needs_function(flat, args):
            return _backends.reference_implementation("pcgrad", direction)(flat, self.num_tasks, *args)
        like = next(grad for grad in flat if grad is not None)
        run = _backends.implementation("pcgrad", direction, _backends.forced(), like)
        return run(flat, self.num_tasks, *args)
