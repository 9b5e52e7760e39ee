"""What this machine could do at best, measured in the same run as what it limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness.peak import register_peak
from benchmarks.harness.timing import timer

# M, N, K: square ones, and oblong ones as the layers of a level make them.
GEMM_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 3072, 416), (4096, 512, 1024)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (65536, 4096, 1024), (65536, 1024, 4096)),
}
# Bytes of the buffer that is read: a large one, and one that stays in cache while it is read again and again.
MEMORY_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
RESIDENT_BYTES = {"cpu": 8 << 20, "cuda": 16 << 20}
# Buffers that a GPU reads faster than the host launches the next call.
MOST_GRAPHED, GRAPHED_CALLS = 64 << 20, 20


@dataclass
class Limits:
    """The best rates seen so far; measuring again can only raise them.

    ``gemm`` are the FLOP/s of PyTorch's matrix products by dtype name, ``registers`` those of a processor's products
    that touch registers alone, where they are known. The others are bytes/s: ``read`` of a buffer larger than a core's
    caches, ``resident_read`` of one that stays in cache, ``copy`` counts bytes read and bytes written.
    """

    device: torch.device
    gemm: dict[str, float] = field(default_factory=dict)
    gemm_shape: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    read: float = 0.0
    resident_read: float = 0.0
    copy: float = 0.0
    registers: dict[str, float] = field(default_factory=dict)

    def measure(self, dtypes: Sequence[torch.dtype], seconds: float) -> None:
        """Spends about ``seconds`` on each dtype's GEMM rate, and as much on each bandwidth."""
        for dtype in dtypes:
            self._measure_gemm(dtype, seconds)
            name = str(dtype).removeprefix("torch.")
            rate = register_peak(name, seconds / 2) if self.device.type == "cpu" else 0.0
            if rate:
                self.registers[name] = max(rate, self.registers.get(name, 0.0))
        kind = self.device.type
        self.read = max(self.read, self._read_rate(MEMORY_BYTES[kind], seconds))
        self.resident_read = max(self.resident_read, self._read_rate(RESIDENT_BYTES[kind], seconds))
        source = torch.ones(MEMORY_BYTES[kind] // 8, device=self.device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() * source.element_size()
        self.copy = max(self.copy, copied / self._best(lambda: target.copy_(source), seconds))

    def _measure_gemm(self, dtype: torch.dtype, seconds: float) -> None:
        name = str(dtype).removeprefix("torch.")
        shapes = GEMM_SHAPES[self.device.type]
        for m, n, k in shapes:
            a = torch.randn(m, k, device=self.device).to(dtype)
            b = torch.randn(k, n, device=self.device).to(dtype)
            out = torch.empty(m, n, device=self.device, dtype=dtype)
            for right in (b, b.t().contiguous().t()):  # as it lies, and transposed as in nn.Linear
                best = self._best(_product(a, right, out), seconds / (2 * len(shapes)))
                rate = 2 * m * n * k / best
                if rate > self.gemm.get(name, 0.0):
                    self.gemm[name], self.gemm_shape[name] = rate, (m, n, k)

    def _read_rate(self, size: int, seconds: float) -> float:
        """Bytes/s of the fastest of three ways to read each element once."""
        x = torch.ones(size // 4, device=self.device)
        rows = x.view(1024, -1)
        ones = torch.ones(rows.shape[1], device=self.device)
        reads: tuple[Callable[[], object], ...] = (x.sum, x.amax, lambda: torch.mv(rows, ones))
        return size / min(self._best(read, seconds / len(reads), graphed=size <= MOST_GRAPHED) for read in reads)

    def _best(self, work: Callable[[], object], seconds: float, graphed: bool = False) -> float:
        """The shortest time of one call, in seconds; ``graphed``: on a GPU the host would take longer to launch it."""
        if graphed and self.device.type == "cuda":
            return self._best(_graph(work), seconds) / GRAPHED_CALLS

        def step() -> None:
            work()

        measure = timer(self.device)
        best = measure(step, 2)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            # The machine's best, so calls are timed singly on the host, and on a GPU in runs that hide the launch.
            best = min(best, measure(step, 10 if self.device.type == "cuda" else 1))
        return best

    def seconds(self, flop: float, traffic: float, dtype: str, resident: bool) -> tuple[float, str]:
        """The shortest time that arithmetic and traffic allow, and which of the two it is."""
        peak, gemm = self.registers.get(dtype, 0.0), self.gemm[dtype]
        arithmetic = flop / max(peak, gemm)
        moving = traffic / (self.resident_read if resident else self.read)
        if arithmetic < moving:
            return moving, "bandwidth"
        return arithmetic, "register peak" if peak > gemm else "GEMM rate"


def _graph(work: Callable[[], object]) -> Callable[[], object]:
    """What makes ``GRAPHED_CALLS`` calls by one launch."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPHED_CALLS):
            work()
    return graph.replay


def _product(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=out)
