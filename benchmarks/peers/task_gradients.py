"""Gradients of tasks that conflict here and there, and what PCGrad makes of them in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Grads = list[list[Tensor]]

# A projection is taken where an inner product is negative. One this close to zero, as the cosine of the angle, may come
# out with either sign by rounding, and two right implementations then differ by a projection.
CLEAR = 3e-3
PART = 1 << 16


def sizes(total: int, tensors: int) -> list[int]:
    """``total`` elements as a network has them: large weights, each followed by a small bias."""
    layers = tensors // 2
    bias = min(256, total // (4 * layers))
    each = total // layers
    lengths = [length for _ in range(layers) for length in (each - bias, bias)]
    lengths[0] += total - sum(lengths)
    return lengths


def orders(num_tasks: int, seed: int = 0) -> list[list[int]]:
    """Row i: task i itself, then the others in a random order.

    Some implementations skip the task itself and some do not. In the first place, where a gradient still is what it
    was, its product with itself is positive and no projection is taken, so that all of them compute the same.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_tasks, generator=generator).tolist() for _ in range(num_tasks)]
    return [[i, *(j for j in row if j != i)] for i, row in enumerate(rows)]


def project(gram: Tensor, order: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """PCGrad on coefficients over the original gradients: [T, T], and the cosine that came closest to zero."""
    num_tasks = len(gram)
    rows = torch.eye(num_tasks, dtype=torch.float64)
    closest = math.inf
    for i in range(num_tasks):
        for j in order[i]:
            if j == i:
                continue
            inner = float(rows[i] @ gram[j])
            length = math.sqrt(float(rows[i] @ gram @ rows[i]) * float(gram[j, j]))
            closest = min(closest, abs(inner) / length)
            if inner < 0:
                rows[i, j] -= inner / float(gram[j, j])
    return rows, closest


def _mixture(num_tasks: int, order: Sequence[Sequence[int]]) -> Tensor:
    """[T, 2] weights of two directions that all tasks share, such that no angle is close to a right one."""
    for seed in range(10_000):
        weights = 0.8 * torch.randn(num_tasks, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gram = weights @ weights.T + torch.eye(num_tasks, dtype=torch.float64)
        if project(gram, order)[1] > 2 * CLEAR:
            return weights
    raise ValueError(f"no angles clear enough found for {num_tasks} tasks")


def dense(
    num_tasks: int, lengths: Sequence[int], order: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Grads:
    """T lists of gradients: noise of a task's own, and a mixture of two directions that all of them share."""
    generator = torch.Generator(device).manual_seed(0)
    weights = _mixture(num_tasks, order).tolist()
    grads: Grads = [[] for _ in range(num_tasks)]
    for length in lengths:
        first, second = torch.randn(2, length, generator=generator, device=device)
        for task, (a, b) in zip(grads, weights, strict=True):
            task.append(
                torch.randn(length, generator=generator, device=device).add_(a * first).add_(b * second).to(dtype)
            )
    return grads


def sparse(
    num_tasks: int, shape: tuple[int, int], touched: int, order: Sequence[Sequence[int]], device: torch.device
) -> Grads:
    """A gradient a task of one embedding table: ``touched`` rows each, of twice as many that all tasks choose from.

    As a backward pass gives them, with rows in no order; a row that is touched twice is there twice.
    """
    generator = torch.Generator().manual_seed(0)
    popular = torch.randperm(shape[0], generator=generator)[: 2 * touched]
    shared = torch.randn(2, len(popular), shape[1], generator=generator)
    grads: Grads = []
    for a, b in _mixture(num_tasks, order).tolist():
        chosen = torch.randint(len(popular), (touched,), generator=generator)
        values = torch.randn(touched, shape[1], generator=generator) + a * shared[0, chosen] + b * shared[1, chosen]
        at = popular[chosen].unsqueeze(0)
        grads.append([torch.sparse_coo_tensor(at, values, shape, check_invariants=True).to(device)])
    return grads


def exact(grads: Grads, order: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The sum of the projected gradients in float64, all parameters one after another.

    Raises:
        ValueError: some angle is so close to a right one that its sign is a matter of rounding.
    """
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=grads[0][0].device)
    for part in _double(grads):
        gram += part @ part.T
    gram = gram.cpu()
    rows, closest = project(gram, order)
    if closest < CLEAR:
        raise ValueError(f"the cosine of every angle must be at least {CLEAR} from zero, got {closest:.1e}")
    total = rows.sum(0).to(grads[0][0].device)
    return {"update": torch.cat([total @ part for part in _double(grads)])}


def _double(grads: Grads) -> Iterator[Tensor]:
    """The gradients in float64, [T, elements], parameter after parameter in parts that fit in a cache."""
    for column in zip(*grads, strict=True):
        flat = [grad.to_dense().reshape(-1) for grad in column]
        for start in range(0, len(flat[0]), PART):
            yield torch.stack([grad[start : start + PART].to(torch.float64) for grad in flat])
