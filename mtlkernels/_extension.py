"""Loads the compiled extension where the install has one."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the extension's)

_module: ModuleType | None
_error: str | None

try:
    _module = importlib.import_module("mtlkernels._C")
    _error = None
except ImportError as error:
    _module = None
    _error = str(error)


def loaded() -> bool:
    """Whether the C++ kernels are there."""
    return _module is not None


def load_error() -> str | None:
    """Why the extension is missing, or None."""
    return _error


def build_facts() -> dict[str, str]:
    """What the extension was built with; empty without one."""
    return dict(_module.build_facts()) if _module is not None else {}
