"""Loads the compiled parts that the install has: the C++ kernels, and those for CUDA."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # its libraries must be loaded before the extension's

FOLDER = Path(__file__).parent


def record(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What setup.py says about the build of an extension; nothing where it did not run."""
    try:
        return dict(json.loads((folder / "_build.json").read_text()).get(name, {}))
    except (OSError, ValueError):
        return {}


def other_torch(name: str, folder: Path = FOLDER) -> str | None:
    """Says so where an extension was built for another minor version of PyTorch, whose C++ interface is another.

    Some of these load all the same, and would read structures as they no longer are.
    """
    return _differs(record(name, folder).get("torch"))


def _differs(built: str | None) -> str | None:
    if built is None or built.split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return f"built for torch {built}, this is torch {torch.__version__}"


def _load_cpp(folder: Path = FOLDER) -> tuple[ModuleType | None, str | None]:
    """The module with the C++ kernels, or why there is none.

    Only that of this folder: an editable install of another checkout would find the one over there.
    """
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None, "No module named 'mtlkernels._C'"
    refusal = other_torch("_C", folder)
    if refusal is not None:
        return None, refusal
    try:
        return importlib.import_module("mtlkernels._C"), None
    except ImportError as error:
        return None, str(error)


_module, _error = _load_cpp()


def _load_cuda(folder: Path = FOLDER) -> str | None:
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


def foreign() -> str | None:
    """What to say of an extension that is loaded, as nothing was recorded of its build, but is for another PyTorch."""
    return _differs(build_facts().get("torch"))


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
