"""The time of each of our kernels within a step, beside what it has to compute and to move at least."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.case import Launch, Step
from benchmarks.harness.limits import Limits

CALLS = 20


@dataclass
class KernelTime:
    """One launch of a step: its median time and its limit, in milliseconds."""

    kernel: str
    flop: int
    traffic: int
    ms: float
    limit_ms: float = math.nan
    limited_by: str = ""

    def set_limit(self, limits: Limits, dtype: str, resident: bool) -> None:
        seconds, self.limited_by = limits.seconds(self.flop, self.traffic, dtype, resident)
        self.limit_ms = 1e3 * seconds

    @property
    def share_of_limit(self) -> float:
        """1 where the kernel takes no longer than arithmetic and traffic allow at this machine's measured rates."""
        return self.limit_ms / self.ms


def measure(step: Step, launches: Sequence[Launch]) -> list[KernelTime]:
    """Profiles some calls of a step on a GPU, of which ``launches`` are the kernels of ours in their order."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return by_launch([(event.name, event.time_range.elapsed_us()) for event in on_device], launches)


def by_launch(times: Sequence[tuple[str, float]], launches: Sequence[Launch]) -> list[KernelTime]:
    """The median time of each launch, from names and microseconds of all kernels on the device in their order.

    Raises:
        ValueError: the kernels of ours are not whole repetitions of ``launches``.
    """
    names = {launch.kernel for launch in launches}
    ours = [(name, duration) for name, duration in times if name in names]
    expected = [launch.kernel for launch in launches]
    calls = len(ours) // len(expected)
    if not ours or [name for name, _ in ours] != expected * calls:
        raise ValueError(f"expected launches of {', '.join(expected)} again and again, found {len(ours)} others")
    return [
        KernelTime(
            launch.kernel,
            launch.flop,
            launch.traffic,
            1e-3 * statistics.median(duration for _, duration in ours[i :: len(expected)]),
        )
        for i, launch in enumerate(launches)
    ]
