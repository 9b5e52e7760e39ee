"""PCGrad as it is usually written: each task's gradients flattened, and a walk over all of them for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.peers.task_gradients import Grads


def usual(grads: Grads, order: Sequence[Sequence[int]]) -> list[Tensor]:
    """The sum of the projected gradients, a tensor a parameter.

    Without what some add to it: copies of the parameters' gradients, and masks of those that have one. The squares of
    the norms are computed once a task, which costs no more than ``norm()`` at each conflict; that would be further off
    in float32 than a wrong contender.
    """
    flat = [torch.cat([grad.reshape(-1) for grad in task]) for task in grads]
    squares = [torch.dot(g, g) for g in flat]
    projected = [g.clone() for g in flat]
    for i, g in enumerate(projected):
        for j in order[i]:
            if j != i:
                inner = torch.dot(g, flat[j])
                if inner < 0:  # on a GPU the host waits for the device here
                    g -= inner / squares[j] * flat[j]
    update = torch.stack(projected).sum(0)
    parts = update.split([grad.numel() for grad in grads[0]])
    return [part.view_as(grad) for part, grad in zip(parts, grads[0], strict=True)]


def usual_backward(
    losses: Sequence[Tensor], shared: Sequence[Tensor], others: Sequence[Tensor], order: Sequence[Sequence[int]]
) -> None:
    """Leaves gradients in ``.grad``: a backward pass a loss, zeros where it does not reach a shared parameter.

    Shared parameters get the sum of the projected gradients, the others that of their gradients as they are.
    """
    by_task: list[list[Tensor]] = []
    of_others: list[list[Tensor]] = [[] for _ in others]
    for task, loss in enumerate(losses):
        retain = task + 1 < len(losses)
        grads = torch.autograd.grad(loss, [*shared, *others], retain_graph=retain, allow_unused=True)
        pairs = zip(grads, shared, strict=False)
        by_task.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
        for found, grad in zip(of_others, grads[len(shared) :], strict=True):
            if grad is not None:
                found.append(grad)
    for parameter, update in zip(shared, usual(by_task, order), strict=True):
        parameter.grad = update
    for parameter, found in zip(others, of_others, strict=True):
        parameter.grad = torch.stack(found).sum(0) if found else None


class Surgery:
    """One call on fixed gradients; what each contender of the suite is a kind of."""

    def __init__(self, grads: Grads, order: Sequence[Sequence[int]]) -> None:
        self.grads = grads
        self.order = order
        self.outputs: Sequence[Tensor] = ()

    def forget(self) -> None:
        self.outputs = ()

    def __call__(self) -> None:
        self.forget()
        self.outputs = self.update()

    def update(self) -> Sequence[Tensor]:
        """A tensor a parameter, or one over all of them."""
        return usual(self.grads, self.order)

    def results(self) -> Mapping[str, Tensor]:
        return {"update": torch.cat([output.to_dense().reshape(-1) for output in self.outputs])}


class DensifiedSurgery(Surgery):
    """The same for sparse gradients, which it cannot take: they are made dense first."""

    def update(self) -> Sequence[Tensor]:
        return usual([[grad.to_dense() for grad in task] for task in self.grads], self.order)


class TouchedRowsSurgery(Surgery):
    """The same for sparse gradients of one table, dense in the rows that any task touches alone."""

    def update(self) -> Sequence[Tensor]:
        table = [task[0] for task in self.grads]
        rows, places = torch.cat([grad._indices()[0] for grad in table]).unique(return_inverse=True)
        width = table[0].shape[1]
        dense = [
            [torch.zeros(len(rows), width, dtype=grad.dtype, device=grad.device).index_add_(0, place, grad._values())]
            for place, grad in zip(places.split([grad._indices().shape[1] for grad in table]), table, strict=True)
        ]
        update = usual(dense, self.order)[0]
        return [torch.sparse_coo_tensor(rows[None], update, table[0].shape, is_coalesced=True, check_invariants=False)]
