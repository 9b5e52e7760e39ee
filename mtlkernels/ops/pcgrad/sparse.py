"""Sparse gradients, as embeddings have them, for PCGrad: nothing is ever as large as the parameter.

Each gradient becomes sorted keys, one a row that it touches, and the rows' values, duplicates added up in float64.
Where the tasks touch much the same rows, as those that are trained on one batch do, their values are laid out over the
union of the rows, and the operators take them for dense. Otherwise inner products run over the pairs of tasks that meet
in a row. On a GPU only the numbers of rows are waited for, as in ``coalesce``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlkernels import _torch

# The values of all tasks over the union of their rows may take this many times the memory of the values themselves.
_FILL = 4


def is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout == torch.sparse_coo


class SparseColumn:
    """The gradients of one parameter, at least one of them sparse.

    Attributes:
        like: the first sparse gradient.
        dense: the dense gradients, by task.
        union: keys of the rows that any sparse gradient touches, sorted.
        place: for each sparse gradient, by task, where its rows are in ``union``.
        values: for each sparse gradient, by task, [rows, ...]; all of the gradients' dtype or of float64.
        aligned: whether ``values`` are laid out over ``union``.
    """

    def __init__(self, column: Sequence[Tensor | None]) -> None:
        self.num_tasks = len(column)
        self.dense = {t: grad for t, grad in enumerate(column) if grad is not None and not is_sparse(grad)}
        sparse = {t: grad for t, grad in enumerate(column) if grad is not None and is_sparse(grad)}
        self.like = next(iter(sparse.values()))
        rows = {t: _rows(grad) for t, grad in sparse.items()}
        dtypes = {values.dtype for _, values in rows.values()}
        dtype = self.like.dtype if dtypes == {self.like.dtype} else torch.float64
        self.values = {t: values.to(dtype) for t, (_, values) in rows.items()}
        keys = torch.cat([keys for keys, _ in rows.values()])
        self.union, place, self._touched = keys.unique(return_inverse=True, return_counts=True)
        self.place = dict(zip(rows, place.split([len(values) for values in self.values.values()]), strict=True))
        self.aligned = len(rows) * len(self.union) <= _FILL * len(place)
        if self.aligned:
            self.values = {t: self._over_union(t) for t in self.values}

    def _over_union(self, task: int) -> Tensor:
        values = self.values[task]
        if len(values) == len(self.union):
            return values
        spread = values.new_zeros(len(self.union), *values.shape[1:])
        spread[self.place[task]] = values
        return spread

    def for_gram(self) -> list[Tensor | None]:
        """Columns of dense tensors, one after another; :meth:`cross` is what their Gram matrix lacks."""
        apart = [self.values] if self.aligned else [{t: values} for t, values in self.values.items()]
        return [grad for column in (self.dense, *apart) if column for grad in self._column(column)]

    def for_combine(self) -> list[Tensor | None]:
        """The column of dense tensors whose weighted sum :meth:`combine` wants, or none."""
        return self._column(self.dense or self.values) if self.dense or self.aligned else []

    def _column(self, grads: dict[int, Tensor]) -> list[Tensor | None]:
        return [grads.get(t) for t in range(self.num_tasks)]

    def cross(self) -> Tensor:
        """Inner products of sparse with dense gradients, and of sparse ones where these are not aligned: [T, T]."""
        shape = (self.num_tasks, self.num_tasks)
        upper = torch.zeros(shape, dtype=torch.float64, device=self.like.device)
        if _torch.func_transforms_active():  # vmap writes to nothing but what it batches
            for grad in self.dense.values():
                upper = upper + grad.new_zeros(shape, dtype=torch.float64)
        if not self.aligned:
            upper += self._meetings(compact=self.like.is_cpu)
        for t, values in self.values.items():
            at = self._indices(self.union if self.aligned else self.union[self.place[t]])
            for i, grad in self.dense.items():
                upper[t, i] = (grad[at].to(torch.float64) * values.to(torch.float64)).sum()
        return upper + upper.T

    def _meetings(self, *, compact: bool) -> Tensor:
        """The inner products of different sparse gradients, those of task i with task j > i at [i, j].

        ``compact`` picks the rows that several tasks touch first: less to do, but their number has to be waited for.
        """
        device = self.like.device
        entries = []
        for t, values in self.values.items():
            place = self.place[t]
            if compact:
                meets = self._touched[place] > 1
                place, values = place[meets], values[meets]
            entries.append((place, torch.full_like(place, t), values))
        place, task, values = map(torch.cat, zip(*entries, strict=True))
        place, order = place.sort(stable=True)  # the entries of a row side by side, in the order of tasks
        total = torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64, device=device)
        for apart in range(1, len(entries)):
            left, right = order[:-apart], order[apart:]
            same = place[:-apart] == place[apart:]
            if compact:
                left, right, same = left[same], right[same], same[same]
            products = values[left].to(torch.float64) * values[right].to(torch.float64)
            inner = torch.where(same, products.unsqueeze(-1).flatten(1).sum(1), 0)
            # A product of matrices adds in a fixed order, where index_add_ on a GPU does not.
            first, second = (torch.zeros(len(same), self.num_tasks, dtype=torch.float64, device=device) for _ in "ij")
            first.scatter_(1, task[left].unsqueeze(1), 1)
            total += first.T @ second.scatter_(1, task[right].unsqueeze(1), inner.unsqueeze(1))
        return total

    def combine(self, coefficients: Tensor, summed: Tensor | None) -> Tensor:
        """``sum_t coefficients_t * g_t``, sparse over the union of rows, or dense where some gradient is.

        Args:
            coefficients: [T] in float64.
            summed: the weighted sum of :meth:`for_combine`; its memory becomes the result's.
        """
        dtype = self.like.dtype
        if summed is not None and not self.dense:
            return self._over_rows(summed.to(dtype))
        sums = self._summed(coefficients)
        if summed is None:
            return self._over_rows(sums.to(dtype))
        at = self._indices(self.union)
        for i, grad in self.dense.items():
            sums = sums + coefficients[i] * grad[at].to(torch.float64)
        return summed.index_put_(at, sums.to(dtype))

    def _summed(self, coefficients: Tensor) -> Tensor:
        """The weighted sum of the sparse gradients over the union of rows, in float64."""
        shape = (len(self.union), *self.like.shape[self.like.sparse_dim() :])
        total = coefficients.new_zeros(shape, dtype=torch.float64, device=self.like.device)  # batched by vmap as these
        for t, values in self.values.items():
            scaled = coefficients[t] * values.to(torch.float64)
            # A call adds to no row twice, so that the order is fixed on a GPU too.
            total = total + scaled if self.aligned else total.index_add_(0, self.place[t], scaled)
        return total

    def _indices(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Where rows are in the parameter: one tensor a sparse dimension."""
        indices: tuple[Tensor, ...] = ()
        for size in reversed(self.like.shape[1 : self.like.sparse_dim()]):
            indices = (keys % size, *indices)
            keys = keys // size
        return (keys, *indices)

    def _over_rows(self, values: Tensor) -> Tensor:
        indices = torch.stack(self._indices(self.union))
        return torch.sparse_coo_tensor(indices, values, self.like.shape, is_coalesced=True, check_invariants=False)


def _rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the rows that a sparse gradient touches, sorted, each once, and their values.

    Values that had to be added up are in float64; others are what they were.
    """
    indices, values = grad._indices(), grad._values()
    keys = indices[0]
    for d in range(1, grad.sparse_dim()):
        keys = keys * grad.shape[d] + indices[d]
    if grad.is_coalesced():
        return keys, values
    size = (grad.shape[: grad.sparse_dim()].numel(), *values.shape[1:])
    wide = values.to(torch.float64)
    merged = torch.sparse_coo_tensor(keys.unsqueeze(0), wide, size, check_invariants=False).coalesce()
    sums = merged.values()
    return merged.indices()[0], sums.to(grad.dtype) if len(sums) == len(values) else sums
