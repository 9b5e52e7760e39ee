"""SNR-Aver in PyTorch: the specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlkernels.ops._snr import of_route
from mtlkernels.ops.gated_mixture.reference import accumulation_dtype
from mtlkernels.ops.snr_trans.reference import routes


def forward(u: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    """``v_i = sum_j z_ij u_j`` over the open routes, those with ``z_ij != 0``: I tensors [B, D].

    A closed route takes no part, whatever ``u_j`` holds. Sums are in float32 (float64 for float64).
    """
    acc = accumulation_dtype(u[0])
    outputs = [torch.zeros(u[0].shape, dtype=acc, device=u[0].device) for _ in range(z.shape[0])]
    for i, j in routes(z):
        outputs[i] = outputs[i] + torch.where(z[i, j] != 0, z[i, j].to(acc) * u[j].to(acc), 0)
    return [v.to(u[0].dtype) for v in outputs]


def backward(
    grad_outputs: Sequence[Tensor], u: Sequence[Tensor], z: Tensor, need_u: bool, need_z: bool, closed_grad: bool
) -> list[Tensor]:
    """Gradients of ``u``, over the open routes, and of ``z``, as wanted: d u_j = sum_i z_ij dv_i, d z_ij = <dv_i, u_j>.

    Without ``closed_grad`` that of a closed route's z is not computed but zero.
    """
    acc = accumulation_dtype(u[0])
    evaluated = routes(z)
    grad_u = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in u] if need_u else []
    grad_z = [torch.zeros((), dtype=acc, device=z.device)] * z.numel()
    for i, j in evaluated if need_u else ():
        grad_u[j] = grad_u[j] + torch.where(z[i, j] != 0, z[i, j].to(acc) * grad_outputs[i].to(acc), 0)
    every = [(i, j) for i in range(z.shape[0]) for j in range(len(u))]
    for i, j in (every if closed_grad else evaluated) if need_z else ():
        inner = (grad_outputs[i].to(acc) * u[j].to(acc)).sum()
        grad_z[i * len(u) + j] = inner if closed_grad else torch.where(z[i, j] != 0, inner, 0)
    joined = [torch.stack(grad_z).view(z.shape).to(z.dtype)] if need_z else []
    return [g.to(u[0].dtype) for g in grad_u] + joined


def formula(u: Sequence[Tensor], z: Tensor) -> tuple[Tensor, ...]:
    """The forward pass with every route, closed or not: what derivatives of the backward pass are taken of."""
    acc = accumulation_dtype(u[0])
    return tuple(
        torch.stack([z[i, j].to(acc) * of_route(z[i, j], x).to(acc) for j, x in enumerate(u)]).sum(0).to(u[0].dtype)
        for i in range(z.shape[0])
    )
