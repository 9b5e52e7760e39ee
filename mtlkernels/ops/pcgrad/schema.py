"""PCGrad's operators.

``grads`` holds T gradients a parameter: that of task t for parameter p stands at p * T + t, or is None. Each operator
is one pass: the Gram matrix of the tasks' gradients, the projections on T x T coefficients, the weighted sum for each
parameter. A ``max_norm`` below zero is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtlkernels._library import define, empty
from mtlkernels.ops._layout import by_parameter
from mtlkernels.ops.pcgrad.checks import any_of, any_of_parameter


def _pcgrad_gram(grads: list[Tensor | None], num_tasks: int) -> Tensor:
    return torch.empty((num_tasks, num_tasks), dtype=torch.float64, device=any_of(grads).device)


def _pcgrad_weights(gram: Tensor, order: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    return empty(gram, gram.shape), empty(gram, gram.shape[:1])


def _pcgrad_combine(grads: list[Tensor | None], num_tasks: int, coefficients: Tensor) -> list[Tensor]:
    columns = by_parameter(grads, num_tasks)
    return [torch.empty_like(any_of_parameter(column, p)) for p, column in enumerate(columns)]


define("pcgrad_gram", _pcgrad_gram)
define("pcgrad_weights", _pcgrad_weights)
define("pcgrad_combine", _pcgrad_combine)
