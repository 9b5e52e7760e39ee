"""mk.show_config() says what the install is made of and how to get what is missing."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires


def line(name: str) -> str:
    return next(text for text in mk.show_config().splitlines() if text.split()[0] == name)


def test_versions() -> None:
    assert mk.__version__ in line("mtlkernels")
    assert platform.python_version() in line("python")
    assert torch.__version__ in line("torch")


def test_one_line_an_op() -> None:
    for op, devices in mk.backends().items():
        for device, names in devices.items():
            assert f"{device}: {', '.join(names)}" in line(op)


def test_cpu() -> None:
    assert torch.backends.cpu.get_cpu_capability() in line("cpu")


@requires.cpp_kernels
def test_build_facts_of_the_extension() -> None:
    for name, value in _extension.build_facts().items():
        assert f"{name} {value}" in line("extension")


def test_without_the_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _extension._Loaded(Path("libmtlkernels.so"), module_error="not built for this Python")
    monkeypatch.setattr(_extension, "_cpp", found)
    assert "calls of a few rows take longer (not built for this Python); libmtlkernels.so" in line("extension")


def test_missing_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_cpp", _extension._Loaded(error="no such file"))
    monkeypatch.setattr("mtlkernels._backends.has_triton", lambda: False)
    assert "missing (no such file)" in line("extension") and "compiler" in line("extension")
    assert "missing" in line("triton") and "pip install triton" in line("triton")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=9))
    assert line("gpu").endswith("GPU 0 (sm_90), GPU 1 (sm_90)")


def test_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_cuda_error", None)
    assert line("cuda").endswith("CUDA C++ kernels for PCGrad")
    monkeypatch.setattr(_extension, "_cuda_error", "not built")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "(not built)" in line("cuda") and "nvcc" in line("cuda")
    monkeypatch.setattr(_extension, "_cuda_error", "this torch is built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert line("cuda").endswith("(this torch is built without CUDA)")
