"""A whole training step under PCGrad: the forward pass, the gradients of ``T`` tasks, the projection, and Adam.

Workload **E** (``B`` rows): a PLE of one and of two levels, D=416, experts with units (256, 128), T = 2 tasks with 4
specific and 4 shared experts, or T = 4 and 8 with 2 and 2; towers 128-64-1, cross-entropy with logits, fused Adam. What
tasks share is the trunk. **E** has 1024 rows, **E-batch** 64 and 4096. In bfloat16 the whole model is, but on a CPU
without products of bfloat16 only with 64 rows, since PyTorch's products take seconds there.

A step is timed from ``zero_grad`` to Adam, whose learning rate is 0, so that each step does the same work on the same
weights. All contenders project in the same order and add projected gradients up. About half of the pairs of tasks
conflict. The peak memory is what a step holds beyond weights, input and Adam's moments, the gradients included.

Before it is timed, each contender's losses and the gradients that it leaves, of the trunk and of each tower, are held
against float64: T backward passes, and a projection whose order is chosen so that rounding cannot turn a conflict. The
plain sum of the losses, which has one backward pass and no projection, is a floor that the surgery adds to, and is held
against its own gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.harness import machine
from benchmarks.harness.case import OURS, Bench, Case, Contender, Curve, Suite
from benchmarks.peers.exact_step import ExactStep
from benchmarks.peers.fused import fused_trunk
from benchmarks.peers.pcgrad_steps import PytorchOptimizerStep, SummedStep, TorchJDStep, UsualStep, WrappedStep
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import TrunkShape
from benchmarks.peers.step_model import StepModel, draw, draw_labels, step_work

STEP = "PCGrad step"
USUAL, OPTIMIZER, TORCHJD, MODULES = "usual", "optimizer", "torchjd", "modules"
SUM, FUSED_SUM = "sum", "fused-sum"
TASKS, LEVELS = (2, 4, 8), (1, 2)
ROWS, OTHER_ROWS = 1024, (64, 4096)
DTYPES = (torch.float32, torch.bfloat16)
QUICK = (4, 2, 64, torch.float32)
# Specific experts a task, and as many shared ones.
EXPERTS = {2: 4, 4: 2, 8: 2}
_EXPERTS = "(specific + shared experts: 4 + 4 where T=2, else 2 + 2)"
# In bfloat16 on a CPU without products of it, where a row of the table with more would take minutes.
MOST_SLOW_ROWS = 64
# torch.dot and GEMMs add millions of squares nearly one after another: TorchJD's Gram matrix in float32 moved the
# update by 1.4e-5. A projection that is not taken moves it by more than 1e-2. In bfloat16 all of that is lost.
SLACK = {torch.float32: 16.0}


def trunk_shape(num_tasks: int, levels: int) -> TrunkShape:
    """The trunk of a row."""
    experts = EXPERTS[num_tasks]
    return TrunkShape(416, num_tasks, experts, experts, units=(256, 128), num_levels=levels)


def _contenders(
    shape: TrunkShape, source: StepModel, x: Tensor, labels: Tensor, exact: ExactStep
) -> Iterator[Contender]:
    def modules() -> StepModel:
        return copy.deepcopy(source)

    def fused() -> StepModel:
        model = modules()
        model.trunk = fused_trunk(shape, source.trunk)
        return model

    backend = mk.backends()["expert_mixture"][x.device.type][0]
    order, seed = exact.order, exact.seed
    yield Contender(USUAL, "modules, the usual PCGrad", lambda: UsualStep(modules(), x, labels, order))
    yield Contender(OPTIMIZER, "modules, pytorch-optimizer", lambda: PytorchOptimizerStep(modules(), x, labels, order))
    yield Contender(TORCHJD, "modules, TorchJD's mtl_backward", lambda: TorchJDStep(modules(), x, labels, order))
    yield Contender(MODULES, "modules, mk.optim.PCGrad", lambda: WrappedStep(modules(), x, labels, seed))
    yield Contender(SUM, "modules, plain sum: a floor", lambda: SummedStep(modules(), x, labels), exact.plain_sum)
    yield Contender(
        FUSED_SUM, "mtlkernels, plain sum: a floor", lambda: SummedStep(fused(), x, labels), exact.plain_sum
    )
    yield Contender(OURS, f"mtlkernels ({backend}), mk.optim.PCGrad", lambda: WrappedStep(fused(), x, labels, seed))


def build(shape: TrunkShape, rows: int, dtype: torch.dtype, device: torch.device) -> Bench:
    """Weights, inputs and labels from a fixed seed, their gradients in float64, and everybody who trains on them."""
    torch.manual_seed(0)
    source = StepModel(PerExpertTrunk(shape), shape).to(dtype).to(device)
    x = draw(source, shape, rows, dtype, device)
    labels = draw_labels(shape, rows, dtype, device)
    exact = ExactStep(source, x, labels)
    return Bench(
        list(_contenders(shape, source, x, labels, exact)),
        exact.surgery,
        baseline=USUAL,
        slack=SLACK.get(dtype, 1.0),
    )


def case(shape: TrunkShape, rows: int, dtype: torch.dtype, *, quick: bool = False) -> Case:
    """A row of the table."""
    needed = step_work(shape, rows, dtype.itemsize)
    return Case(
        workload="E" if rows == ROWS else "E-batch",
        work=STEP,
        dtype=dtype,
        size={"T": shape.num_tasks, "levels": shape.num_levels, "B": rows},
        flop=needed.flop,
        traffic=needed.traffic,
        build=lambda device: build(shape, rows, dtype, device),
        quick=quick,
        memory=True,
        rounds=3,
        seconds=2.0,
    )


def cases(device_type: str) -> Iterator[Case]:
    """Every row on that device."""
    slow = device_type == "cpu" and not machine.multiplies_bfloat16()
    for dtype in DTYPES:
        for levels in LEVELS:
            for num_tasks in TASKS:
                for rows in sorted((ROWS, *OTHER_ROWS)):
                    if dtype == torch.float32 or not slow or rows <= MOST_SLOW_ROWS:
                        quick = (num_tasks, levels, rows, dtype) == QUICK
                        yield case(trunk_shape(num_tasks, levels), rows, dtype, quick=quick)


SUITE = Suite(
    name="pcgrad-step",
    title="A training step under PCGrad",
    cases=cases,
    curves=(
        Curve("tasks", f"PCGrad step, two levels, B={ROWS} {_EXPERTS}", "T", ("E",), STEP, {"levels": 2}),
        Curve("tasks-one-level", f"PCGrad step, one level, B={ROWS} {_EXPERTS}", "T", ("E",), STEP, {"levels": 1}),
        Curve("rows", "PCGrad step, two levels, 8 tasks", "B", ("E", "E-batch"), STEP, {"levels": 2, "T": 8}),
        Curve("rows-one-level", "PCGrad step, one level, 8 tasks", "B", ("E", "E-batch"), STEP, {"levels": 1, "T": 8}),
    ),
    sweeps=("E-batch",),
)
