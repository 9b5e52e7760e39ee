"""The arithmetic and the traffic of every workload, against what PyTorch counts and against the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import Case
from benchmarks.harness.work import projection, sparse_projection
from benchmarks.peers import task_gradients
from benchmarks.peers.shape import TrunkShape
from benchmarks.suites import mixture, pcgrad_step, snr

CPU = torch.device("cpu")
SHAPES = {
    "one level": TrunkShape(6, num_tasks=2, num_specific=2, num_shared=1, units=(5, 4), last_shared_gate=True),
    "two levels": TrunkShape(6, num_tasks=3, num_specific=1, num_shared=2, units=(5, 3, 4), num_levels=2),
}
ROWS = 7


def baseline(case: Case) -> Any:
    """The step of the contender that users have."""
    made = case.build(CPU)
    return next(c for c in made.contenders if c.name == made.baseline).build()


def counted_flop(step: Any, *without: Any) -> int:
    """What PyTorch counts of a call, but for some operators."""
    with FlopCounterMode(display=False) as counter:
        step()
    return sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if op not in without)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_trunks(shape: TrunkShape, training: bool, precision: torch.dtype) -> None:
    case = mixture.case("tiny", shape, ROWS, precision, training)
    step = baseline(case)
    assert counted_flop(step, torch.ops.aten.bmm) == case.flop  # mixing is the only bmm
    moved = [step.x, *step.module.parameters(), *step.outputs]
    gradients = [step.x.grad, *(p.grad for p in step.module.parameters()), *step.cotangents] if training else []
    assert sum(tensor.nbytes for tensor in (*moved, *gradients)) == case.traffic


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pcgrad_steps(levels: int) -> None:
    """Each task's gradients are counted that its loss has."""
    shape = TrunkShape(6, num_tasks=3, num_specific=2, num_shared=1, units=(5, 4), num_levels=levels)
    case = pcgrad_step.case(shape, ROWS, torch.float32)
    step = baseline(case)
    assert counted_flop(step, torch.ops.aten.bmm) == case.flop  # mixing is the only bmm
    step.forget()
    losses = step.model.losses(step.model.trunk(step.x), step.labels)
    moved = [step.x, *(9 * list(step.model.parameters()))]
    for loss in losses:
        found = torch.autograd.grad(loss, step.shared, retain_graph=True, allow_unused=True)
        moved += 3 * [grad for grad in found if grad is not None]
    assert sum(tensor.nbytes for tensor in moved) == case.traffic


@pytest.mark.parametrize("training", [False, True])
def test_routes(training: bool) -> None:
    shape = snr.RouteShape(rows=ROWS, below=3, above=2, width=5)
    case = snr.case("tiny", shape, 3, torch.float32, training, quick=False)
    step = baseline(case)
    assert counted_flop(step) == case.flop
    moved = [*step.u, step.weight, *step.outputs]
    gradients = [*(x.grad for x in step.u), step.weight.grad, *step.cotangents] if training else []
    assert sum(tensor.nbytes for tensor in (*moved, *gradients)) == case.traffic


@pytest.mark.parametrize("training", [False, True])
def test_closed_routes_take_nothing(training: bool) -> None:
    shape = snr.RouteShape(rows=ROWS, below=4, above=2, width=5)
    dense, half = (shape.work(routes, 4, training) for routes in (4, 2))
    weights = 2 * 2 * 5 * 5 * 4
    assert half.flop == dense.flop / 2 and dense.traffic - half.traffic == weights * (2 if training else 1)
    means = snr.RouteShape(rows=ROWS, below=4, above=2, width=5, trans=False).work(4, 4, training)
    assert means.flop == dense.flop / 5 and means.traffic == (4 + 2) * ROWS * 5 * 4 * (2 if training else 1)


def test_pcgrad() -> None:
    """Half of a Gram matrix, as many products as it has elements on and above the diagonal, and one matrix-vector."""
    tasks, lengths = 3, [40, 8]
    grads = task_gradients.dense(tasks, lengths, task_gradients.orders(tasks), torch.float32, CPU)
    matrix = torch.stack([torch.cat(task) for task in grads])
    with FlopCounterMode(display=False) as counter:
        for i in range(tasks):
            matrix[i:] @ matrix[i].unsqueeze(1)
        torch.ones(1, tasks) @ matrix
    needed = projection(tasks, sum(lengths), 4)
    assert needed.flop == counter.get_total_flops()
    assert needed.traffic == 2 * matrix.nbytes + matrix[0].nbytes


def test_sparse_pcgrad() -> None:
    tasks, touched, width = 4, 300, 16
    order = task_gradients.orders(tasks)
    grads = [task[0] for task in task_gradients.sparse(tasks, (4000, width), touched, order, CPU)]
    needed = sparse_projection(tasks, touched, width, 4, 8)
    read = sum(g._values().nbytes + g._indices().nbytes for g in grads)
    update = sum(grads[1:], grads[0]).coalesce()
    written = update.values().nbytes + update.indices().nbytes
    assert needed.traffic == pytest.approx(2 * read + written, rel=0.1)
    assert needed.flop == projection(tasks, touched * width, 4).flop
