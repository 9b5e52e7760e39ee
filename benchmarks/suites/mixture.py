"""Gated expert mixture: the trunks of MMoE, CGC and PLE, forward alone and in training.

Workloads (``B`` rows):

- **A** one level, D=416, 2 tasks x 4 specific + 4 shared experts with units (256, 128), three gates (two tasks', one
  shared), B=4096.
- **A2** a PLE of two levels of A; as in the paper, the last has no shared gate.
- **A1** A at B = 1, 16, 64 and 256, forward only: serving. Weights stay in cache between calls, as they do in a server.
- **A-batch** A in training with fewer rows, and **A-experts** with B=1024 and E experts, a third of them for each task
  and a third shared: how the cost of a step grows.
- **B** a PLE of two levels, D=1024, 4 tasks x 4 + 8 shared experts with units (512, 256), B=65536: a GPU's share.

What is timed includes the gates' linear layers. Forward is in ``eval()`` under ``torch.inference_mode()``. Training is
forward and backward of the sum of outputs times fixed random cotangents, with the gradients of all parameters and of
the input, as a level inside a model has them, freed before each step. Its peak memory is what a step holds beyond
parameters and input: what is saved between forward and backward, and the gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.harness.case import BASELINE, FORWARD, OURS, TRAINING, Bench, Case, Contender, Curve, Step, Suite
from benchmarks.peers.compiled import compiled, frozen
from benchmarks.peers.exact import evaluate, rows_at_a_corner
from benchmarks.peers.fused import fused_launches, fused_trunk
from benchmarks.peers.graphed import graphed
from benchmarks.peers.hand_batched import HandBatchedTrunk, by_grouped_mm, by_quack
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import LEVEL, TWO_LEVELS, TrunkShape

LARGE = TrunkShape(1024, num_tasks=4, num_specific=4, num_shared=8, units=(512, 256), num_levels=2)
ROWS = 4096
LARGE_ROWS = 65536
SERVING_ROWS = (1, 16, 64, 256)
TRAINING_ROWS = (1, 16, 64, 256, 1024)
EXPERTS, EXPERTS_ROWS = (3, 6, 12, 24), 1024
DTYPES = (torch.float32, torch.bfloat16)
# torch.compile in another way, where rows are few and weights stay as they are.
FROZEN = "frozen"


class TrunkStep:
    """Forward, or forward and backward when there are cotangents, of one trunk."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor], tuple[Tensor, ...]],
        gradients: Callable[[], dict[str, Tensor]],
        x: Tensor,
        cotangents: list[Tensor] | None,
    ) -> None:
        self.module = module.train(cotangents is not None)
        self.forward = forward
        self.gradients = gradients
        self.x = x.detach().clone().requires_grad_(cotangents is not None)
        self.cotangents = cotangents
        self.trained = [self.x, *module.parameters()]
        self.outputs: Sequence[Tensor] = ()

    def forget(self) -> None:
        self.outputs = ()
        if self.cotangents is not None:
            for tensor in self.trained:
                tensor.grad = None

    def __call__(self) -> None:
        self.forget()
        if self.cotangents is None:
            with torch.inference_mode():
                self.outputs = self.forward(self.x)
            return
        outputs = self.forward(self.x)
        # The gradient of the sum of outputs times cotangents, without the time to compute that sum.
        torch.autograd.backward(outputs, self.cotangents)
        self.outputs = tuple(y.detach() for y in outputs)

    def results(self) -> Mapping[str, Tensor]:
        found = {f"outputs: {k}": y for k, y in enumerate(self.outputs)}
        if self.cotangents is not None:
            assert self.x.grad is not None
            found["gradients: input"] = self.x.grad
            found |= self.gradients()
        return found


def build(shape: TrunkShape, rows: int, dtype: torch.dtype, training: bool, device: torch.device) -> Bench:
    """Parameters, input and cotangents from a fixed seed, and everybody who evaluates them."""
    torch.manual_seed(0)
    source = PerExpertTrunk(shape).to(dtype).to(device)
    x = torch.randn(rows, shape.in_features).to(dtype).to(device)
    cotangents = None
    if training:
        gates = shape.routing(shape.num_levels - 1).num_gates
        clear = ~rows_at_a_corner(source, x).unsqueeze(1)
        cotangents = [torch.randn(rows, shape.units[-1]).to(dtype).to(device) * clear for _ in range(gates)]

    def eager() -> Step:
        trunk = copy.deepcopy(source)
        return TrunkStep(trunk, trunk, trunk.gradients, x, cotangents)

    def compile_modules(mode: str) -> Step:
        trunk, forward = compiled(source, mode)
        return TrunkStep(trunk, forward, trunk.gradients, x, cotangents)

    def freeze_modules() -> Step:
        trunk, forward = frozen(source, x)
        return TrunkStep(trunk, forward, dict, x, None)

    def batched() -> Step:
        trunk = HandBatchedTrunk(source)
        return TrunkStep(trunk, trunk, trunk.gradients, x, cotangents)

    def in_graph(trunk: Any) -> Step:
        return TrunkStep(trunk, graphed(trunk.train(training), x, training), trunk.gradients, x, cotangents)

    def ours() -> Step:
        trunk = fused_trunk(shape, source)
        return TrunkStep(trunk, trunk, trunk.gradients, x, cotangents)

    def prepared() -> Step:
        trunk: nn.Module = mk.prepare(fused_trunk(shape, source))
        return TrunkStep(trunk, trunk, dict, x, None)

    backend = mk.backends()["expert_mixture"][device.type][0]
    contenders = [
        Contender(BASELINE, "per-expert modules, eager", eager),
        Contender("compile", "per-expert modules, torch.compile", lambda: compile_modules("default")),
        Contender("batched", "hand-batched: one linear + bmm", batched),
        Contender(OURS, f"mtlkernels ({backend})", ours),
    ]
    if device.type == "cpu" and not training:
        contenders.append(Contender("prepared", "mtlkernels, a copy by mk.prepare", prepared))
        contenders.insert(2, Contender(FROZEN, "per-expert modules, torch.compile, frozen", freeze_modules))
    if device.type == "cuda":
        modes = (("graph", "reduce-overhead"), ("autotuned", "max-autotune"))
        contenders[2:2] = [
            Contender(name, f"torch.compile, {mode}", partial(compile_modules, mode)) for name, mode in modes
        ]
        graphs: dict[str, tuple[str, Callable[[], Any]]] = {
            "batched-graph": ("hand-batched by bmm", lambda: HandBatchedTrunk(source)),
            "grouped-graph": ("hand-batched by F.grouped_mm", lambda: HandBatchedTrunk(source, by_grouped_mm)),
            "ours-graph": (f"mtlkernels ({backend})", lambda: fused_trunk(shape, source)),
        }
        if not training:
            graphs["quack-graph"] = ("hand-batched by QuACK's gemm_act", lambda: HandBatchedTrunk(source, by_quack()))
        contenders += [
            Contender(name, f"{label}, in a CUDA graph", lambda make=make: in_graph(make()))  # type: ignore[misc]
            for name, (label, make) in graphs.items()
        ]
    return Bench(contenders, lambda: evaluate(source, x, cotangents))


def case(
    workload: str,
    shape: TrunkShape,
    rows: int,
    dtype: torch.dtype,
    training: bool,
    *,
    serving: bool = False,
    quick: bool = False,
    size: Mapping[str, int] | None = None,
) -> Case:
    """A row of the table from the sizes of a trunk."""
    needed = shape.work(rows, dtype.itemsize, training)
    return Case(
        workload=workload,
        work=TRAINING if training else FORWARD,
        dtype=dtype,
        size={"B": rows, **(size or {})},
        flop=needed.flop,
        traffic=needed.traffic,
        build=lambda device: build(shape, rows, dtype, training, device),
        resident=serving,
        launches=lambda device: fused_launches(shape, rows, dtype, training, device),
        quick=quick,
        memory=training,
    )


def cases(device_type: str) -> Iterator[Case]:
    """Every row on that device."""
    for dtype in DTYPES:
        for rows in SERVING_ROWS:
            quick = dtype == torch.float32 and rows in (1, 64)
            yield case("A1", LEVEL, rows, dtype, False, serving=True, quick=quick)
    trunks = [("A", LEVEL, ROWS), ("A2", TWO_LEVELS, ROWS)]
    if device_type == "cuda":
        trunks.append(("B", LARGE, LARGE_ROWS))
    for workload, shape, rows in trunks:
        for training in (False, True):
            for dtype in DTYPES:
                yield case(workload, shape, rows, dtype, training, quick=workload == "A")
    for dtype in DTYPES:
        for rows in TRAINING_ROWS:
            yield case("A-batch", LEVEL, rows, dtype, True)
        for experts in EXPERTS:
            shape = replace(LEVEL, num_specific=experts // 3, num_shared=experts // 3)
            yield case("A-experts", shape, EXPERTS_ROWS, dtype, True, size={"E": shape.num_experts})


SUITE = Suite(
    name="mixture",
    title="Gated expert mixture",
    cases=cases,
    curves=(
        Curve("batch", "One level (workloads A1 and A), forward", "B", ("A1", "A"), FORWARD),
        Curve("batch-training", "One level (workloads A-batch and A), training", "B", ("A-batch", "A"), TRAINING),
        Curve("experts", "One level with B=1024 (workload A-experts), training", "E", ("A-experts",), TRAINING),
    ),
    sweeps=("A-batch", "A-experts"),
)
