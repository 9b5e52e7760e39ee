"""The operators of snr_trans.

``weights`` holds one stacked tensor [I, J, D_out, D_in], or I * J matrices: that of the route from sub-network j to
sub-network i stands at i * J + j. Without ``closed_grad`` the gradient of z is zero where z is.
"""

from __future__ import annotations

from torch import Tensor

from mtlkernels._library import cast_first, define, empty
from mtlkernels.ops.snr_trans import reference


def _forward(u: list[Tensor], weights: list[Tensor], z: Tensor) -> list[Tensor]:
    stacked = weights[0].dim() == 4
    widths = [weights[0].shape[2] if stacked else weights[i * len(u)].shape[0] for i in range(z.shape[0])]
    return [empty(u[0], (u[0].shape[0], width)) for width in widths]


def _backward(
    grad_outputs: list[Tensor],
    u: list[Tensor],
    weights: list[Tensor],
    z: Tensor,
    need_u: bool,
    need_weights: bool,
    need_z: bool,
    closed_grad: bool,
) -> list[Tensor]:
    grad_u = [empty(x, x.shape) for x in u] if need_u else []
    grad_weights = [empty(w, w.shape) for w in weights] if need_weights else []
    return grad_u + grad_weights + ([empty(z, z.shape)] if need_z else [])


define("snr_trans_forward", _forward, cast_first(2), reference.formula)
define("snr_trans_backward", _backward)
