"""Loads the compiled parts that the install has: the C++ kernels, and those for CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # its libraries must be loaded before the extension's

_module: ModuleType | None
_error: str | None

try:
    _module = importlib.import_module("mtlkernels._C")
    _error = None
except ImportError as error:
    _module = None
    _error = str(error)


def _load_cuda(folder: Path = Path(__file__).parent) -> str | None:
    """Registers the operators of ``mtlkernels_cuda``; returns why that is not possible, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    found = sorted(folder.glob("_cuda*.so"))
    if not found:
        return "not built"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return str(error.__cause__ or error)
    return None


_cuda_error = _load_cuda()


def cuda_loaded() -> bool:
    """Whether the CUDA C++ kernels are there."""
    return _cuda_error is None


def cuda_load_error() -> str | None:
    """Why the CUDA C++ kernels are missing, or None."""
    return _cuda_error


def loaded() -> bool:
    """Whether the C++ kernels are there."""
    return _module is not None


def function(name: str) -> Callable[..., Any]:
    """A function of the extension, which must be there."""
    found: Callable[..., Any] = getattr(_module, name)
    return found


def load_error() -> str | None:
    """Why the extension is missing, or None."""
    return _error


def build_facts() -> dict[str, str]:
    """What the extension was built with; empty without one."""
    return dict(_module.build_facts()) if _module is not None else {}


def instruction_sets() -> tuple[str, ...]:
    """What the C++ kernels can run on this processor, the best last; empty without the extension."""
    return tuple(_module.instruction_sets()) if _module is not None else ()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within the block the C++ kernels use this instruction set, for tests and measurements.

    Raises:
        ValueError: this build or this processor has none of that name.
    """
    if name not in instruction_sets() or _module is None:
        raise ValueError(f"name must be one of {instruction_sets()}, got {name!r}")
    _module.select_isa(name)
    try:
        yield
    finally:
        _module.select_isa(instruction_sets()[-1])
