"""What several examples need: arguments, a small data set of clicks, torch-rechub's PLE, and timing in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import PLE

SPARSE, VOCABULARY, EMBEDDING, DENSE = 10, 1000, 40, 16  # 10 x 40 + 16 = 416 features enter the first level
TASKS = ("click", "conversion")


def arguments(doc: str | None, *, steps: int, rows: int, rounds: int = 30) -> argparse.ArgumentParser:
    """The options that all examples have, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps ({steps})")
    parser.add_argument("--rows", type=int, default=rows, help=f"rows of a batch ({rows})")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timings, of which the median counts ({rounds})")
    return parser


def click_data(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, 10], numbers [N, 16] and labels [N, 2] made by chance: who clicked, and who then bought something."""
    generator = torch.Generator().manual_seed(seed)
    taste = torch.randn(SPARSE, VOCABULARY, len(TASKS), generator=generator)
    slope = torch.randn(DENSE, len(TASKS), generator=generator)
    codes = torch.randint(VOCABULARY, (rows, SPARSE), generator=generator)
    numbers = torch.randn(rows, DENSE, generator=generator)
    score = taste[torch.arange(SPARSE), codes].mean(1) * 3 + numbers @ slope / 4
    chance = torch.rand(rows, len(TASKS), generator=generator) < score.sigmoid()
    return codes, numbers, chance.cumprod(1).float()


def by_name(codes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """The features as torch-rechub's models take them."""
    sparse = {f"code{i}": column for i, column in enumerate(codes.unbind(1))}
    return sparse | {f"number{i}": column for i, column in enumerate(numbers.unbind(1))}


def rechub_ple(seed: int = 0) -> PLE:
    """torch-rechub's PLE: two levels of 4 experts a task and 4 shared ones, 416 → 256 → 128; a seed, one model."""
    torch.manual_seed(seed)
    features = [SparseFeature(f"code{i}", VOCABULARY, embed_dim=EMBEDDING) for i in range(SPARSE)]
    features += [DenseFeature(f"number{i}") for i in range(DENSE)]
    experts, towers = {"dims": [256, 128]}, [{"dims": [64]}] * len(TASKS)
    return PLE(features, ["classification"] * len(TASKS), 2, 4, 4, experts, towers)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call. They take turns, so that a slow moment of the machine is not one call's alone."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # leaves in the caches what a loop of this call would find there
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def print_times(what: str, calls: dict[str, Callable[[], object]], rounds: int) -> None:
    """A line a call: its time, and how many times as fast as the first one it is."""
    found = medians(calls, rounds)
    first = next(iter(found.values()))
    print(f"\n{what} ({torch.get_num_threads()} threads, medians of {rounds})")
    for name, milliseconds in found.items():
        print(f"  {name:<44} {milliseconds:8.3f} ms   {first / milliseconds:5.2f}x")
