"""What all examples need: options, and timing in turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch


def number(text: str) -> int:
    """Of at least 1, as an argument."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def arguments(doc: str | None, *, steps: int, rows: int) -> argparse.ArgumentParser:
    """The options that all examples have, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number, default=steps, help=f"training steps ({steps})")
    parser.add_argument("--rows", type=number, default=rows, help=f"rows of a batch ({rows})")
    parser.add_argument("--rounds", type=number, default=30, help="timings, of which the median counts (30)")
    return parser


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
    print(f"\n{what}, medians of {rounds}, threads: {torch.get_num_threads()}")
    for name, milliseconds in found.items():
        print(f"  {name:<44} {milliseconds:8.3f} ms   {first / milliseconds:5.2f}x")
