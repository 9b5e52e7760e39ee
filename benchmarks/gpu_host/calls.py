"""The calls that are timed: workload A's level, with different numbers of experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.gpu_host.driver import launching_nothing

# A third of the experts is shared, and a third is each of two tasks'.
EXPERTS = (6, 12, 24, 63)
ROWS, CALLS = 64, 400
WIDTHS, SMALL = (416, 256, 128), (16, 16)
# What is wanted, in microseconds, whatever the number of experts.
TARGETS = {"forward": 60.0, "forward+backward": 250.0}
PYTORCH = "of which PyTorch's"


class Carrier(torch.autograd.Function):
    """Carries as many tensors through PyTorch as a level has, and does nothing: what it takes is PyTorch's."""

    @staticmethod
    def forward(outputs: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(y) for y in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, *ctx.saved_tensors)


def measure(experts: int, rows: int, calls: int, widths: Sequence[int] = WIDTHS) -> dict[str, Any]:
    """Medians and fifth percentiles in microseconds, of serving, of forward and backward, and of PyTorch's part.

    The first calls, which compile and record, are not timed.
    """
    each = experts // 3
    routing = mk.Routing.cgc(2, each, experts - 2 * each, single_input=True)
    torch.manual_seed(0)
    parameters: dict[str, Any] = {
        "weights": [_tensors(experts, *shape) for shape in zip(widths[1:], widths, strict=False)],
        "biases": [_tensors(experts, width) for width in widths[1:]],
        "gate_weights": [torch.randn(len(gate), widths[0], dtype=torch.bfloat16) for gate in routing.gate_experts],
        "gate_biases": [torch.randn(len(gate), dtype=torch.bfloat16) for gate in routing.gate_experts],
    }
    x = torch.randn(rows, widths[0], dtype=torch.bfloat16)
    leaves = [x, *(t for layers in parameters["weights"] + parameters["biases"] for t in layers)]
    leaves += [*parameters["gate_weights"], *parameters["gate_biases"]]

    def forward() -> Any:
        return mk.expert_mixture(x, gate_logits=None, routing=routing, **parameters)

    def served() -> None:
        with torch.no_grad():
            forward()

    grads = [torch.randn(rows, widths[-1], dtype=torch.bfloat16) for _ in routing.gate_experts]

    def step() -> None:
        torch.autograd.grad(forward(), leaves, grads)

    def carried() -> None:
        torch.autograd.grad(Carrier.apply(grads, *leaves), leaves, grads)

    with launching_nothing() as driver:
        launches, times = {}, {}
        for name, run in (("forward", served), ("forward+backward", step), (PYTORCH, carried)):
            for leaf in leaves:
                leaf.requires_grad_(run is not served)
            for _ in range(5):
                before = driver.launches
                run()
            launches[name] = driver.launches - before
            times[name] = _times(run, calls)
    return {"experts": experts, "rows": rows, "launches": launches, "microseconds": times}


def _tensors(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.bfloat16) for _ in range(count)]


def _times(run: Callable[[], None], calls: int) -> dict[str, float]:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        found.append(1e6 * (time.perf_counter() - start))
    return {"median": statistics.median(found), "fastest": statistics.quantiles(found, n=20)[0]}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row each, in Markdown."""
    lines = [
        "| experts | call | launches | median, us | fastest twentieth, us | wanted, us |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        for call, times in row["microseconds"].items():
            figures = f"{times['median']:.0f} | {times['fastest']:.0f} | {TARGETS.get(call, '')}"
            lines.append(f"| {row['experts']} | {call} | {row['launches'][call]} | {figures} |")
    return "\n".join(lines)
