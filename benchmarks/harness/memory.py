"""The most memory that a call holds, as PyTorch's allocators see it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2.0**20
# The profiler writes lines of its own to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_mib(call: Callable[[], None], device: torch.device) -> float:
    """MiB that ``call`` holds at its peak beyond what was there before, its results included.

    What does not come from PyTorch's allocators is not seen; none of the contenders has large buffers of another kind.
    """
    return (_peak_cuda if device.type == "cuda" else _peak_cpu)(call) / MIB


def _peak_cuda(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _peak_cpu(call: Callable[[], None]) -> float:
    """The CPU's allocator keeps no statistics, but it reports each allocation and release to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    results = found.profiler.kineto_results if found.profiler else None
    assert results is not None
    held = peak = 0
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return float(peak)
