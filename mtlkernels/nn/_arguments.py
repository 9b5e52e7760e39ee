"""Checks of constructor arguments. Messages name the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtlkernels.ops._checks import DTYPES, check_tensor, shape_of
from mtlkernels.ops.activations import CODES
from mtlkernels.routing import as_int


def positive(name: str, value: Any) -> int:
    """``value``, an int of at least 1."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def units(name: str, value: Any, *, may_be_empty: bool, of: str = "layer's width") -> tuple[int, ...]:
    """``value`` as a tuple of numbers, each a layer's width if not something else."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, each a {of}, got {type(value).__name__}")
    if not value and not may_be_empty:
        raise ValueError(f"{name} must hold at least one {of}, got an empty sequence")
    return tuple(positive(f"{name}[{i}]", width) for i, width in enumerate(value))


def check_features(x: Any, width: int) -> None:
    """An input [B, D] of a trunk."""
    check_tensor("x", x, 2, f"[B, {width}]")
    if x.shape[1] != width:
        raise ValueError(f"x must have shape [B, {width}], got {shape_of(x)}")


@dataclass(frozen=True)
class Style:
    """What is common to the layers of a trunk."""

    activation: str
    batch_norm: bool
    dropout: float
    device: Any
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if not isinstance(self.activation, str):
            raise TypeError(f"activation must be a name, got {type(self.activation).__name__}")
        if self.activation not in CODES:
            raise ValueError(f"activation must be one of {', '.join(CODES)}, got {self.activation!r}")
        if not isinstance(self.batch_norm, bool):
            raise TypeError(f"batch_norm must be a bool, got {type(self.batch_norm).__name__}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise TypeError(f"dropout must be a float, got {type(self.dropout).__name__}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64 of torch, got {self.dtype!r}")

    @property
    def factory(self) -> dict[str, Any]:
        """Keyword arguments of ``torch.nn`` constructors."""
        return {"device": self.device, "dtype": self.dtype}
