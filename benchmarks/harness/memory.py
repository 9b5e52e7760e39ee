"""The most memory that a call holds, as PyTorch's allocators see it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.case import Step
from mtlkernels import _extension

MIB = 2.0**20
# The profiler writes lines of its own to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_mib(step: Step, device: torch.device) -> float:
    """MiB that a call of a step holds at its peak beyond what was there before, its outputs included.

    Earlier results are let go of first, and so is memory that mtlkernels keeps from one call to the next.
    What does not come from PyTorch's allocators is not seen; none of the contenders has large buffers of another kind.
    Outputs in memory that the call did not allocate come from a pool of the contender's own, and count as well.
    """
    step.forget()
    if _extension.loaded():
        _extension.function("release_memory")()
    peak, left = (_call_cuda if device.type == "cuda" else _call_cpu)(step)
    return (peak + max(0, _bytes(step.outputs) - left)) / MIB


def _call_cuda(step: Step) -> tuple[int, int]:
    """Bytes held at the peak of a call and left behind by it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def _call_cpu(step: Step) -> tuple[int, int]:
    """The CPU's allocator keeps no statistics, but it reports each allocation and release to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        step()
    results = found.profiler.kineto_results if found.profiler else None
    assert results is not None
    held = lowest = peak = 0
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        lowest = min(lowest, held)  # something older was let go of
        peak = max(peak, held - lowest)
    return peak, held - lowest


def _bytes(outputs: Iterable[Tensor]) -> int:
    """Of all tensors, memory that they share counted once."""
    dense = [part for y in outputs for part in ((y._indices(), y._values()) if y.is_sparse else (y,))]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in dense}.values())
