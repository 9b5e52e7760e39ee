"""What runs on a machine with a GPU, slice by slice: the build, the tests, the sanitizer, the suites."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVEL, PROJECTIONS, CUDA = "tests/triton/test_cuda.py", "tests/triton/test_cuda_pcgrad.py", "tests/cuda"
PYTHON = sys.executable
BUILD = "build"
# Cases that between them take every kernel of levels and SNR, with and without alignment (of wide inputs' kernel, which
# is for large cards, operands are always aligned); and of PCGrad, whose lists are small. The sanitizer slows them 10 to
# 50 times.
SMALL = "ieee and (one_row or aligned or odd) and not large"
SMALL_LISTS = "random_lists or strided or missing or unaligned"
HOST = "waits or wait_for or graph or stream or device or recorded"


@dataclass(frozen=True)
class Slice:
    """Commands that belong together; ``tool``: a program without which they cannot run."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    tool: str | None = None

    @property
    def missing(self) -> str | None:
        """What it lacks here."""
        return self.tool if self.tool and shutil.which(self.tool) is None else None


def _tests(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=50", *arguments)


def _sanitized(tool: str) -> Slice:
    """Each tensor has memory of its own: within what PyTorch keeps for many the tools would see no bounds."""
    apart = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    watch = (*apart, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    small = _tests("-x", LEVEL, "-k", SMALL), _tests("-x", PROJECTIONS, CUDA, "-k", SMALL_LISTS)
    return Slice(tool, tuple((*watch, *tests) for tests in small), "compute-sanitizer")


def _written(folder: Path) -> tuple[str, ...]:
    """Where results go; plots where they can be drawn."""
    drawn = importlib.util.find_spec("matplotlib") is not None
    return ("--json", str(folder), *(("--plot", str(folder)) if drawn else ()))


def _suite(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "benchmarks/run.py", name, "--device", "cuda", *arguments)


def _suites(folder: Path) -> Iterator[Slice]:
    """Those of a suite add rows to one file, and may be repeated: each row is there as soon as it is measured."""
    yield Slice("suites", tuple(_suite(name, "--quick") for name in ("mixture", "pcgrad", "pcgrad-step", "snr")))
    parts: dict[str, tuple[tuple[str, ...], ...]] = {
        # Each row compiles three times, which takes longer than to time it.
        "mixture": (("A",), ("B",), ("A2",), ("A-batch",), ("A1",), ("A-experts",)),
        "pcgrad": ((),),
        "pcgrad-step": ((),),
        "snr": ((),),
    }
    for name, workloads in parts.items():
        for some in workloads:
            only = ("--workload", *some) if some else ()
            command = _suite(name, *_written(folder), "--resume", *only)
            yield Slice("-".join(("suite", name, *some)), (command,))


def every_slice(folder: Path) -> Sequence[Slice]:
    """In the order in which they are worth their time; results go to ``folder``."""
    build = (PYTHON, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", str(ROOT))
    # Without the CUDA kernels their tests would be skipped, and their slices pass.
    there = "assert mk.backends()['pcgrad']['cuda'][:2] == ('cuda', 'triton'), 'kernels are missing'"
    config = (PYTHON, "-c", f"import mtlkernels as mk; print(mk.show_config()); {there}")
    driver = (PYTHON, "benchmarks/run.py", "gpu-host", *_written(folder))
    return (
        Slice(BUILD, (build, config)),
        Slice("smoke", (_tests("-x", LEVEL, "-k", SMALL), _tests("-x", PROJECTIONS, CUDA, "-k", "options or strided"))),
        Slice("chains", (_tests(LEVEL, "-k", "not layerwise and not snr"),)),
        Slice("norms", (_tests(LEVEL, "-k", "layerwise or statistics"),)),
        Slice("snr", (_tests(LEVEL, "-k", "snr or routes"),)),
        Slice("pcgrad", (_tests(PROJECTIONS, CUDA),)),
        Slice("host", (_tests(LEVEL, PROJECTIONS, CUDA, "-k", HOST), driver)),
        _sanitized("memcheck"),
        _sanitized("racecheck"),
        _sanitized("synccheck"),
        *_suites(folder),
    )
