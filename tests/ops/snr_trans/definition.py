"""snr_trans by its formula, independent of the package."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def formula(u: Any, weight: Any, z: Tensor, *, closed_grad: bool = True) -> list[Tensor]:
    """v_i = sum_j z_ij W_ij u_j."""
    return [sum(z[i, j] * (x @ row[j].transpose(0, 1)) for j, x in enumerate(u)) for i, row in enumerate(weight)]
