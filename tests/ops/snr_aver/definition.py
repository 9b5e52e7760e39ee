"""snr_aver by its formula, independent of the package."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def formula(u: Any, z: Tensor, *, closed_grad: bool = True) -> list[Tensor]:
    """v_i = sum_j z_ij u_j."""
    return [sum(value * x for value, x in zip(row, u, strict=True)) for row in z.unbind(0)]
