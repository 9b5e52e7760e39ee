"""The operators of snr_aver; see those of snr_trans."""

from __future__ import annotations

from torch import Tensor

from mtlkernels._library import cast_first, define, empty
from mtlkernels.ops.snr_aver import reference


def _forward(u: list[Tensor], z: Tensor) -> list[Tensor]:
    return [empty(u[0], u[0].shape) for _ in range(z.shape[0])]


def _backward(
    grad_outputs: list[Tensor], u: list[Tensor], z: Tensor, need_u: bool, need_z: bool, closed_grad: bool
) -> list[Tensor]:
    grad_u = [empty(x, x.shape) for x in u] if need_u else []
    return grad_u + ([empty(z, z.shape)] if need_z else [])


define("snr_aver_forward", _forward, cast_first(1), reference.formula)
define("snr_aver_backward", _backward)
