"""Tensors that are distributed over ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def has_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether one of them is a DTensor. If nothing has imported these there are none; nor does this import them."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and any(isinstance(tensor, dtensor) for tensor in tensors)
