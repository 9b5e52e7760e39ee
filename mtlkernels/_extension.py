"""Loads the compiled parts that the install has: the C++ kernels, and those for CUDA.

The C++ kernels are ``lib/torch<minor version>/libmtlkernels.so``, which registers the operators and knows nothing of
Python, and beside it ``_C``, the direct way to them from one version of Python. Without the latter the operators serve
by way of the dispatcher.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # its libraries must be loaded before the extension's

from mtlkernels._source import digest

FOLDER = Path(__file__).parent
LIBRARY = "libmtlkernels.so"
LEAST_TORCH = "2.10"  # as pyproject.toml has it


def record(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What setup.py says about the build of an extension; nothing where it did not run."""
    try:
        return dict(json.loads((folder / "_build.json").read_text()).get(name, {}))
    except (OSError, ValueError):
        return {}


def place(version: str, folder: Path = FOLDER) -> Path:
    """Where the C++ kernels for a version of PyTorch lie: one for each minor version, whose C++ interface is its own.

    Some built for another one would load all the same, and read structures as they no longer are.
    """
    return folder / "lib" / f"torch{'_'.join(version.split('.')[:2])}"


def built_for(folder: Path = FOLDER) -> list[str]:
    """The minor versions of PyTorch that C++ kernels are there for, the oldest first."""
    found = [tuple(path.parent.name.removeprefix("torch").split("_")) for path in folder.glob(f"lib/torch*/{LIBRARY}")]
    return [f"{major}.{minor}" for major, minor in sorted(found, key=lambda numbers: [int(n) for n in numbers])]


def of_another_source(folder: Path = FOLDER) -> bool:
    """Whether kernels were built in a checkout whose source is another one since, as after an update."""
    built = record("_C", folder)
    if "source" not in built or built.get("torch") != torch.__version__:  # nothing is known of those that were loaded
        return False
    try:
        return digest(folder.parent) not in (None, built["source"])
    except OSError:  # of sources that are another user's
        return False


def is_supported(version: str) -> bool:
    """Whether a version of PyTorch is one that this package is for, or built for one."""
    minor = [int(number) for number in version.split(".")[:2]]
    return minor >= [int(number) for number in LEAST_TORCH.split(".")]


@dataclass(frozen=True)
class _Loaded:
    """What was found: a path and a module, or why there is none."""

    library: Path | None = None
    error: str | None = None
    module: ModuleType | None = None
    module_error: str | None = None


def _load_cpp(folder: Path = FOLDER) -> _Loaded:
    """Of this folder alone: an editable install of another checkout would find the module over there."""
    own = place(torch.__version__, folder)
    if not (own / LIBRARY).exists():
        built = built_for(folder)
        kernels = f"built for torch {' and '.join(built)}, this is torch {torch.__version__}" if built else "not built"
        return _Loaded(error=kernels)
    try:
        torch.ops.load_library(str(own / LIBRARY))
    except OSError as error:
        return _Loaded(error=str(error.__cause__ or error))
    if not any((own / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return _Loaded(own / LIBRARY, module_error="not built for this Python")
    try:
        return _Loaded(own / LIBRARY, module=importlib.import_module(f"mtlkernels.lib.{own.name}._C"))
    except ImportError as error:
        return _Loaded(own / LIBRARY, module_error=str(error))


_cpp = _load_cpp()


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
    return _cpp.library is not None


def operator_library() -> Path | None:
    """The shared library with the C++ kernels of this install, for the PyTorch that runs.

    A program without Python loads it, by dlopen() or by being linked to it, before it loads a model that was exported
    with fused operators: ``examples/serving`` shows how. Loading it defines the operators ``mtlkernels::*`` with their
    kernels for CPUs. It needs libtorch of the same minor version.

    Returns:
        Its path, or None where the C++ kernels are missing; :func:`show_config` says why.
    """
    return _cpp.library


def load_error() -> str | None:
    """Why the C++ kernels are missing, or None."""
    return _cpp.error


def has_module() -> bool:
    """Whether there is a direct way from Python to the C++ kernels."""
    return _cpp.module is not None


def module_error() -> str | None:
    """Why there is no direct way from Python to C++ kernels that are there, or None."""
    return _cpp.module_error


def function(name: str) -> Callable[..., Any]:
    """A function of the module, which must be there.

    Raises:
        RuntimeError: the module is of another source, as in a checkout that was updated and not built again.
    """
    try:
        found: Callable[..., Any] = getattr(_cpp.module, name)
    except AttributeError as error:
        raise RuntimeError(
            f"the C++ kernels were built from another source than this, and have no {name!r}: build them again"
        ) from error
    return found


def build_facts() -> dict[str, str]:
    """What the module was built with; empty without one."""
    return dict(_cpp.module.build_facts()) if _cpp.module is not None else {}


def instruction_sets() -> tuple[str, ...]:
    """What the C++ kernels can run on this processor, the best last; empty without the module."""
    return tuple(_cpp.module.instruction_sets()) if _cpp.module is not None else ()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within the block the C++ kernels use this instruction set, for tests and measurements.

    Its best kernels then serve layers of any width, where otherwise narrow ones have those that serve them faster.

    Raises:
        ValueError: this build or this processor has none of that name.
    """
    if name not in instruction_sets():
        raise ValueError(f"name must be one of {instruction_sets()}, got {name!r}")
    function("select_isa")(name)
    try:
        yield
    finally:
        function("select_isa")(None)
