"""Interleaved timing: all contenders of a row take turns, so that a slow minute of the machine hits each of them."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A sample shorter than this would measure the clock and the interpreter's hiccups.
SAMPLE_SECONDS = 5e-3
# Who comes to a step after another one finds that one's data in the caches. A training loop or a server repeats its own
# step: a shorter one than this is called once before it is timed. Of longer ones that is a small part.
REPEATED_SECONDS = 0.15
# Rounds are few where one of the steps is slow. So that the median of a fast one rests on more samples than that, it
# gives one a round for each factor MUCH_FASTER by which it is faster, up to MOST_SAMPLES.
MUCH_FASTER, MOST_SAMPLES = 5.0, 8


@dataclass(frozen=True)
class Budget:
    """How long a row may take. Warm-up and timed rounds count; building, compiling and checking do not.

    Args:
        seconds: for the rounds of one row, over all its contenders.
        warmup: seconds for each contender before the first round.
        min_rounds: rounds that are run even when the time is up.
    """

    seconds: float = 8.0
    warmup: float = 0.3
    min_rounds: int = 5


QUICK = Budget(seconds=0.6, warmup=0.05, min_rounds=3)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: quartiles over the samples, each the mean of ``calls`` calls in a row."""

    median: float
    lower: float
    upper: float
    best: float
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.upper - self.lower) / (2 * self.median)


def _time_cpu(step: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _time_cuda(step: Callable[[], None], calls: int) -> float:
    """Events bracket the work on the device; a step that the host launches too slowly shows as idle time there."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / calls


def timer(device: torch.device) -> Callable[[Callable[[], None], int], float]:
    """A function of a step and a number of calls in a row: the seconds of one call."""
    return _time_cuda if device.type == "cuda" else _time_cpu


def quantile(ordered: list[float], share: float) -> float:
    """The value below which that share of the ordered values lies, interpolated."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _summary(seconds: list[float], calls: int) -> Timing:
    ordered = sorted(1e3 * s for s in seconds)
    return Timing(
        median=quantile(ordered, 0.5),
        lower=quantile(ordered, 0.25),
        upper=quantile(ordered, 0.75),
        best=ordered[0],
        samples=len(ordered),
        calls=calls,
    )


def _warm_up(
    step: Callable[[], None], measure: Callable[[Callable[[], None], int], float], seconds: float
) -> tuple[int, float]:
    """Runs a step until ``seconds`` have passed; the calls that make a sample long enough, and seconds of a sample."""
    shortest = math.inf
    start = time.perf_counter()
    while True:
        shortest = min(shortest, measure(step, 1))
        if time.perf_counter() - start >= seconds:
            calls = max(1, math.ceil(SAMPLE_SECONDS / shortest))
            return calls, calls * shortest


def _samples_a_round(times_as_fast: float) -> int:
    return max(1, min(MOST_SAMPLES, int(times_as_fast / MUCH_FASTER)))


def interleaved(steps: Mapping[str, Callable[[], None]], device: torch.device, budget: Budget) -> dict[str, Timing]:
    """Times every step: in each round each of them gives a sample, or some, in an order that is shuffled anew.

    Inputs and weights are the same in every call, and a short step follows one of its own, so that they are warm in
    cache as far as they fit. A small serving batch and a training loop find them so too.
    """
    measure = timer(device)
    warm = {name: _warm_up(step, measure, budget.warmup) for name, step in steps.items()}
    calls = {name: found for name, (found, _) in warm.items()}
    slowest = max(seconds for _, seconds in warm.values())
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = [name for name, (_, seconds) in warm.items() for _ in range(_samples_a_round(slowest / seconds))]
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while rounds < budget.min_rounds or time.perf_counter() - start < budget.seconds:
            shuffle(order)
            for name in order:
                if warm[name][1] < REPEATED_SECONDS:
                    steps[name]()
                samples[name].append(measure(steps[name], calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples[name], calls[name]) for name in steps}
