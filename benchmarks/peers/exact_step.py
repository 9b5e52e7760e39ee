"""The gradients that a training step should leave, in float64, with or without PCGrad."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.step_model import StepModel
from benchmarks.peers.task_gradients import CLEAR, project
from mtlkernels.ops.pcgrad import draw_order

# Rows evaluated at a time, so that float64 intermediates of a large batch fit in memory.
CHUNK = 1024
# Cosines nearer to zero than this may have either sign by rounding. In bfloat16 gradients are off by some per cent of
# their size.
CLEAR_ANGLES = {torch.float32: CLEAR, torch.bfloat16: 10 * CLEAR}
MOST_DRAWS = 1000


class ExactStep:
    """T backward passes in float64, and an order of projections in which no angle is close to a right one.

    Args:
        source: the model, in the dtype whose weights are meant.
        x, labels: its inputs and labels.

    Attributes:
        seed: what a generator is seeded with to draw the order as ``mk.optim.PCGrad`` does.
        order: [T][T], row i the task i itself, then the others in the order of the projections. There no implementation
            that projects a gradient on itself as well takes that projection.

    Raises:
        ValueError: some angle is nearly a right one in each of many orders.
    """

    def __init__(self, source: StepModel, x: Tensor, labels: Tensor) -> None:
        self.model = copy.deepcopy(source).double()
        self.trunk = list(self.model.trunk.parameters())
        self.losses, self.trunk_grads, self.tower_grads = self._differentiate(x, labels)
        self.gram = _gram(self.trunk_grads)
        self.seed, self.order = self._clear_order(CLEAR_ANGLES[x.dtype])

    def _differentiate(self, x: Tensor, labels: Tensor) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]:
        """The losses [T], and for each task the gradients of the trunk's parameters and of its tower's."""
        num_tasks, rows = labels.shape
        losses = torch.zeros(num_tasks, dtype=torch.float64, device=x.device)
        trunk = [[torch.zeros_like(p) for p in self.trunk] for _ in range(num_tasks)]
        towers = [[torch.zeros_like(p) for p in tower.parameters()] for tower in self.model.towers]
        for start in range(0, rows, CHUNK):
            part = slice(start, start + CHUNK)
            share = labels[:, part].shape[1] / rows
            found = self.model.losses(self.model.trunk(x[part].double()), labels[:, part].double())
            for task, loss in enumerate(found):
                parameters = [*self.trunk, *self.model.towers[task].parameters()]
                grads = torch.autograd.grad(loss * share, parameters, retain_graph=True, allow_unused=True)
                for total, grad in zip([*trunk[task], *towers[task]], grads, strict=True):
                    if grad is not None:
                        total += grad
                losses[task] += share * loss.detach()
        return losses, trunk, towers

    def _clear_order(self, clear: float) -> tuple[int, list[list[int]]]:
        closest = 0.0
        for seed in range(MOST_DRAWS):
            order = drawn_order(seed, len(self.gram))
            _, found = project(self.gram, order)
            if found > clear:
                return seed, order
            closest = max(closest, found)
        raise ValueError(
            f"the cosine of every angle must be at least {clear} from zero in one of {MOST_DRAWS} orders, got {closest}"
        )

    def surgery(self) -> dict[str, Tensor]:
        """The sum of the trunk's projected gradients; each tower has its own task's gradient."""
        return self._results(project(self.gram, self.order)[0].sum(0))

    def plain_sum(self) -> dict[str, Tensor]:
        """Gradients of the sum of the losses."""
        return self._results(torch.ones(len(self.gram), dtype=torch.float64))

    def _results(self, weights: Tensor) -> dict[str, Tensor]:
        """The trunk has the weighted sum of the tasks' gradients."""
        for parameter, *grads in zip(self.trunk, *self.trunk_grads, strict=True):
            parameter.grad = torch.stack([weight * g for weight, g in zip(weights.tolist(), grads, strict=True)]).sum(0)
        for tower, grads in zip(self.model.towers, self.tower_grads, strict=True):
            for parameter, grad in zip(tower.parameters(), grads, strict=True):
                parameter.grad = grad
        return {"outputs: losses": self.losses} | self.model.gradients()


def drawn_order(seed: int, num_tasks: int) -> list[list[int]]:
    """What ``mk.optim.PCGrad`` draws from a generator on the CPU with that seed, but each task itself first."""
    drawn = draw_order(None, torch.Generator().manual_seed(seed), num_tasks, torch.device("cpu"), True)
    assert drawn is not None
    return [[task, *(j for j in row if j != task)] for task, row in enumerate(drawn.tolist())]


def _gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """[T, T] inner products, on the CPU."""
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=grads[0][0].device)
    for column in zip(*grads, strict=True):
        flat = torch.stack([grad.flatten() for grad in column])
        gram += flat @ flat.T
    return gram.cpu()
