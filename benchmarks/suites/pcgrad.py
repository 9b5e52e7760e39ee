"""PCGrad: one update from the gradients of ``T`` tasks over ``P`` parameters in so many ``tensors``.

Workloads:

- **C** T=8, P=10M (on a GPU 50M) in 40 tensors and in 400.
- **C-tasks** and **C-size** other T and P, to show how the cost grows. What is small stays in a cache from one call to
  the next, for every contender alike, and may then pass the limit, which is that of memory.
- **C-sparse** 8 tasks, an embedding of 1M x 32 of which each task touches 20,000 rows; the usual PCGrad on gradients
  made dense, as it is written, and on the rows that any task touches, as one would write it by hand.

Gradients are there; what is timed goes from lists of them to the update, a tensor a parameter, or TorchJD's vector
where its matrix is said to be ready. All contenders project in the same order. The peak memory of a call is what it
holds beyond the gradients, the update included. Plain reads of as many bytes take their turns among them, as the share
of the faster one is what the call is measured by.

The usual PCGrad under ``torch.compile`` is no contender: with its branches on inner products none of it is compiled;
without them it takes half a minute to compile and is a tenth faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.harness.case import OURS, Bench, Case, Contender, Curve, Suite
from benchmarks.harness.work import projection, sparse_projection
from benchmarks.peers import task_gradients
from benchmarks.peers.pcgrad_libraries import PytorchOptimizer, TorchJD, TorchJDReady
from benchmarks.peers.plain_read import WAYS, PlainRead, whole
from benchmarks.peers.task_gradients import Grads
from benchmarks.peers.usual_pcgrad import DensifiedSurgery, Surgery, TouchedRowsSurgery

UPDATE = "update"
TOUCHED_ROWS = "touched-rows"
USUAL, OPTIMIZER, TORCHJD, READY = "usual", "optimizer", "torchjd", "torchjd-ready"
READS = {f"read-{way}": way for way in WAYS}
TASKS = 8
TENSORS = 40
MILLION = 1_000_000
SIZE = {"cpu": 10 * MILLION, "cuda": 50 * MILLION}
TASK_SWEEP = (2, 4, 8, 16)
TASK_SWEEP_SIZE = {"cpu": MILLION, "cuda": 10 * MILLION}
SIZE_SWEEP = {"cpu": (40 * MILLION,), "cuda": (MILLION, 100 * MILLION)}
TABLE, TOUCHED = (MILLION, 32), 20_000
# torch.dot and GEMMs add millions of squares nearly one after another: at P=10M the usual PCGrad was off by 1.4e-5 and
# TorchJD's by 1.1e-4 on one thread. Neither is wrong, and 5e-4 still tells a projection that is not taken. In bfloat16
# all of that is lost in the rounding.
SLACK = {torch.float32: 128.0}


class Ours(Surgery):
    """``mtlkernels.pcgrad`` on the lists as they are."""

    def __init__(self, grads: Grads, order: Sequence[Sequence[int]]) -> None:
        super().__init__(grads, order)
        self.rows = torch.tensor(order, device=grads[0][0].device)

    def update(self) -> Sequence[Tensor]:
        found: list[Tensor] = mk.pcgrad(self.grads, order=self.rows)
        return found


def _ours(grads: Grads, order: Sequence[Sequence[int]]) -> Contender:
    backend = mk.backends()["pcgrad"][grads[0][0].device.type][0]
    return Contender(OURS, f"mtlkernels ({backend})", lambda: Ours(grads, order))


def _contenders(grads: Grads, order: Sequence[Sequence[int]]) -> list[Contender]:
    return [
        Contender(USUAL, "the usual PCGrad", lambda: Surgery(grads, order)),
        Contender(OPTIMIZER, "pytorch-optimizer", lambda: PytorchOptimizer(grads, order)),
        Contender(TORCHJD, "TorchJD, concatenation included", lambda: TorchJD(grads, order)),
        Contender(READY, "TorchJD on a ready matrix", lambda: TorchJDReady(grads, order)),
        _ours(grads, order),
    ]


def _reading(traffic: float, device: torch.device) -> list[Contender]:
    def contender(name: str, way: str) -> Contender:
        label = f"a plain read of as many bytes, by {way}: a floor"
        return Contender(name, label, lambda: PlainRead(traffic, device, way), whole)

    return [contender(*read) for read in READS.items()]


def build(
    num_tasks: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device, leave_out: Sequence[str]
) -> Bench:
    """Gradients from a fixed seed, which no contender changes, everybody who projects them, and who only reads."""
    order = task_gradients.orders(num_tasks)
    grads = task_gradients.dense(num_tasks, lengths, order, dtype, device)
    reading = _reading(projection(num_tasks, sum(lengths), dtype.itemsize).traffic, device)
    return Bench(
        [contender for contender in (*_contenders(grads, order), *reading) if contender.name not in leave_out],
        lambda: task_gradients.exact(grads, order),
        baseline=USUAL,
        slack=SLACK.get(dtype, 1.0),
    )


def build_sparse(num_tasks: int, shape: tuple[int, int], touched: int, device: torch.device) -> Bench:
    """Sparse gradients, which no library among the contenders takes."""
    order = task_gradients.orders(num_tasks)
    grads = task_gradients.sparse(num_tasks, shape, touched, order, device)
    usual = Contender(USUAL, "the usual PCGrad, densified", lambda: DensifiedSurgery(grads, order))
    touched_rows = Contender(TOUCHED_ROWS, "the usual PCGrad on touched rows", lambda: TouchedRowsSurgery(grads, order))
    return Bench(
        [usual, touched_rows, _ours(grads, order)],
        lambda: task_gradients.exact(grads, order),
        baseline=USUAL,
        slack=SLACK[torch.float32],
    )


def case(
    workload: str,
    num_tasks: int,
    parameters: int,
    tensors: int,
    dtype: torch.dtype = torch.float32,
    *,
    quick: bool = False,
    leave_out: Sequence[str] = (),
) -> Case:
    """A row of the table."""
    lengths = task_gradients.sizes(parameters, tensors)
    needed = projection(num_tasks, parameters, dtype.itemsize)
    return Case(
        workload=workload,
        work=UPDATE,
        dtype=dtype,
        size={"T": num_tasks, "P": parameters, "tensors": tensors},
        flop=needed.flop,
        traffic=needed.traffic,
        build=lambda device: build(num_tasks, lengths, dtype, device, leave_out),
        quick=quick,
        memory=True,
        rounds=3,
    )


def sparse_case(num_tasks: int, shape: tuple[int, int], touched: int) -> Case:
    """The row of sparse gradients."""
    needed = sparse_projection(num_tasks, touched, shape[1], torch.float32.itemsize, torch.int64.itemsize)
    return Case(
        workload="C-sparse",
        work=UPDATE,
        dtype=torch.float32,
        size={"T": num_tasks, "P": shape[0] * shape[1], "tensors": 1},
        flop=needed.flop,
        traffic=needed.traffic,
        build=lambda device: build_sparse(num_tasks, shape, touched, device),
        memory=True,
        rounds=3,
    )


def cases(device_type: str) -> Iterator[Case]:
    """Every row on that device."""
    size = SIZE[device_type]
    for tensors in (TENSORS, 10 * TENSORS):
        yield case("C", TASKS, size, tensors)
    # On a CPU products in bfloat16 are slow: seconds a call of the usual PCGrad, and as many of pytorch-optimizer's.
    leave_out = (OPTIMIZER,) if device_type == "cpu" else ()
    yield case("C", TASKS, size, TENSORS, torch.bfloat16, leave_out=leave_out)
    for num_tasks in TASK_SWEEP:
        yield case("C-tasks", num_tasks, TASK_SWEEP_SIZE[device_type], TENSORS, quick=num_tasks in (2, TASKS))
    for parameters in SIZE_SWEEP[device_type]:
        # On a CPU pytorch-optimizer's alone would take a minute, and TorchJD's Gram matrix, a product in float32, is
        # off by 9e-4 at P=40M, which would rightly fail.
        left_out = (*leave_out, TORCHJD, READY) if device_type == "cpu" else ()
        yield case("C-size", TASKS, parameters, TENSORS, leave_out=left_out)
    yield sparse_case(TASKS, TABLE, TOUCHED)


SUITE = Suite(
    name="pcgrad",
    title="PCGrad",
    cases=cases,
    curves=(
        Curve("tasks", "PCGrad: time against the number of tasks", "T", ("C-tasks",), UPDATE),
        Curve(
            "size",
            "PCGrad, 8 tasks: time against the number of parameters",
            "P",
            ("C", "C-tasks", "C-size"),
            UPDATE,
            {"T": TASKS, "tensors": TENSORS},
        ),
    ),
)
