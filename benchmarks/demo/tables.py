"""What the demo prints: the machine, and tables in which two models stand beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.demo.flights import TASKS
from benchmarks.harness import machine
from benchmarks.harness.timing import Timing

Two = tuple[str, str]  # what the two models are called, the one that others are compared with first


def place() -> str:
    """The machine and what serves the op on it, in a line."""
    here = machine.describe(torch.device("cpu"))
    backend = mk.backends()["expert_mixture"]["cpu"][0]
    threads = torch.get_num_threads()
    return f"{here['cpu']}, {threads} threads, {here['cpu_capability']}, torch {torch.__version__}, backend {backend}"


def tenths(steps: int) -> list[tuple[int, int]]:
    """Start and end of each tenth of the steps; a step each where there are fewer than ten."""
    edges = sorted({round(steps * tenth / 10) for tenth in range(11)})
    return list(zip(edges[:-1], edges[1:], strict=True))


def print_losses(names: Two, before: Sequence[float], after: Sequence[float]) -> None:
    print("\nTraining loss, mean over each tenth of the steps")
    print(f"  {'steps':>11}  {names[0]:>10}  {names[1]:>10}  {'difference':>10}")
    for start, end in tenths(len(before)):
        a, b = statistics.fmean(before[start:end]), statistics.fmean(after[start:end])
        print(f"  {f'{start + 1}-{end}':>11}  {a:>10.5f}  {b:>10.5f}  {b - a:>+10.1e}")


def print_quality(names: Two, before: Sequence[float], after: Sequence[float], labels: Tensor) -> None:
    print("\nArea under the ROC curve in the test period (0.5 is guessing, 1 is perfect)")
    print(f"  {'task':<15}  {'flights':>8}  {'share':>6}  {names[0]:>10}  {names[1]:>10}")
    for task, name in enumerate(TASKS):
        known = labels[:, task][~labels[:, task].isnan()]
        share = f"{100 * known.mean().item():.1f}%"
        print(f"  {name:<15}  {len(known):>8,}  {share:>6}  {before[task]:>10.4f}  {after[task]:>10.4f}")


def speedups(names: Two, rows: Mapping[int, Mapping[str, Timing]]) -> dict[int, float]:
    """Batch size -> how many times as fast the second model is."""
    return {size: row[names[0]].median / row[names[1]].median for size, row in rows.items()}


def print_times(names: Two, title: str, rows: Mapping[int, Mapping[str, Timing]]) -> None:
    print(f"\n{title}; whole model, embeddings and towers included), median ms")
    print(f"  {'rows':>6}  {names[0]:>10}  {names[1]:>10}  {'faster':>7}")
    for size, faster in speedups(names, rows).items():
        a, b = (rows[size][name].median for name in names)
        print(f"  {size:>6,}  {a:>10.2f}  {b:>10.2f}  {faster:>6.2f}×")
