"""What tests need and a machine may lack; in the same words each time, as the end of a run counts them."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch.distributed as dist

from mtlkernels import _extension

SETS = _extension.instruction_sets()
_LACKING = "this processor lacks" if SETS else "an install without C++ kernels lacks"


def instruction_set(*names: str, what: str) -> pytest.MarkDecorator:
    """Any of these."""
    return pytest.mark.skipif(not {*names} & {*SETS}, reason=f"needs {what}, which {_LACKING}")


def memory(gigabytes: int) -> None:
    """Skips the test that runs where less memory is free."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    if free < gigabytes * 10**9:
        pytest.skip(f"needs {gigabytes} GB of free memory, which this machine lacks")


cpp_kernels = pytest.mark.skipif(not _extension.loaded(), reason="needs C++ kernels, which this install lacks")
amx = instruction_set("amx", what="AMX")
kept_weights = instruction_set("amx", "split", what="AMX")  # whose kernels alone keep weights that are prepared
cuda_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which this machine lacks")
cuda_kernels = pytest.mark.skipif(
    not _extension.cuda_loaded(), reason=f"needs CUDA C++ kernels; this install: {_extension.cuda_load_error()}"
)
gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo, which this build of PyTorch lacks"
)
inductor = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs g++ or what CXX names, which this machine lacks"
)
