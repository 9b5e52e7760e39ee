"""What of memory a process has, and what the C++ kernels keep of it."""

from __future__ import annotations

from pathlib import Path

from mtlkernels import _extension


def release() -> int:
    """Lets go of what the kernels keep for later calls; the number of bytes."""
    freed: int = _extension.function("release_memory")()
    return freed


def peak() -> int:
    """The most memory that this process has had resident since the peak was forgotten."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
