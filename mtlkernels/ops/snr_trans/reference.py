"""SNR-Trans in PyTorch: the specification that every other implementation is tested against.

Weights travel as one stacked tensor [I, J, D_out, D_in], or as I * J matrices [D_out_i, D_in_j] of which that from
sub-network j to sub-network i stands at ``i * J + j``; gradients of weights come back in the same form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels import _tracing
from mtlkernels.ops._snr import of_route
from mtlkernels.ops.gated_mixture.reference import accumulation_dtype


def matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    """The I * J matrices."""
    return list(weights[0].flatten(0, 1).unbind(0)) if weights[0].dim() == 4 else list(weights)


def routes(z: Tensor) -> list[tuple[int, int]]:
    """The routes (i, j) to evaluate: those that are open where that can be read at no cost, otherwise all of them."""
    num_outputs, num_inputs = z.shape
    every = [(i, j) for i in range(num_outputs) for j in range(num_inputs)]
    if not z.is_cpu or _tracing.observed():
        return every
    is_open = (z != 0).tolist()
    return [(i, j) for i, j in every if is_open[i][j]]


def forward(u: Sequence[Tensor], weights: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    """``v_i = sum_j z_ij W_ij u_j`` over the open routes, those with ``z_ij != 0``: I tensors [B, D_out_i].

    A closed route takes no part, whatever its weight holds. The products are of the dtype of ``u``, scaled and added up
    in float32 (float64 for float64).
    """
    acc = accumulation_dtype(u[0])
    matrix, rows, num_inputs = matrices(weights), u[0].shape[0], len(u)
    outputs = [torch.zeros(rows, w.shape[0], dtype=acc, device=w.device) for w in matrix[::num_inputs]]
    for i, j in routes(z):
        term = z[i, j].to(acc) * F.linear(u[j], matrix[i * num_inputs + j]).to(acc)
        outputs[i] = outputs[i] + torch.where(z[i, j] != 0, term, 0)
    return [v.to(u[0].dtype) for v in outputs]


def backward(
    grad_outputs: Sequence[Tensor],
    u: Sequence[Tensor],
    weights: Sequence[Tensor],
    z: Tensor,
    need_u: bool,
    need_weights: bool,
    need_z: bool,
    closed_grad: bool,
) -> list[Tensor]:
    """Gradients of ``u``, of the weights and of ``z``, those that are wanted.

    With M_ij = dv_i^T u_j: d u_j = sum_i z_ij dv_i W_ij, d W_ij = z_ij M_ij and d z_ij = <M_ij, W_ij>. Those of u and W
    are over the open routes alone. A closed route has a d z too, for which M is computed and not kept; without
    ``closed_grad`` it is not computed and d z is zero there.
    """
    acc = accumulation_dtype(u[0])
    matrix, num_inputs, dtype = matrices(weights), len(u), u[0].dtype
    evaluated = routes(z)
    grad_u = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in u] if need_u else []
    grad_matrix = [torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in matrix] if need_weights else []
    grad_z = [torch.zeros((), dtype=acc, device=z.device)] * z.numel()
    for i, j in evaluated if need_u else ():
        term = z[i, j].to(acc) * (grad_outputs[i] @ matrix[i * num_inputs + j]).to(acc)
        grad_u[j] = grad_u[j] + torch.where(z[i, j] != 0, term, 0)
    every = [(i, j) for i in range(z.shape[0]) for j in range(num_inputs)]
    products = every if need_z and closed_grad else evaluated if need_weights or need_z else []
    for i, j in products:
        at = i * num_inputs + j
        product = (grad_outputs[i].t() @ u[j]).to(acc)
        if need_weights:
            grad_matrix[at] = torch.where(z[i, j] != 0, z[i, j].to(acc) * product, 0).to(dtype)
        if need_z:
            inner = (product * matrix[at]).sum()
            grad_z[at] = inner if closed_grad else torch.where(z[i, j] != 0, inner, 0)
    if need_weights and weights[0].dim() == 4:
        grad_matrix = [torch.stack(grad_matrix).view(weights[0].shape)]
    joined = [torch.stack(grad_z).view(z.shape).to(z.dtype)] if need_z else []
    return [g.to(dtype) for g in grad_u] + grad_matrix + joined


def formula(u: Sequence[Tensor], weights: Sequence[Tensor], z: Tensor) -> tuple[Tensor, ...]:
    """The forward pass with every route, closed or not: what derivatives of the backward pass are taken of."""
    acc = accumulation_dtype(u[0])
    matrix, num_inputs = matrices(weights), len(u)

    def term(i: int, j: int) -> Tensor:
        x, w = (of_route(z[i, j], t) for t in (u[j], matrix[i * num_inputs + j]))
        return z[i, j].to(acc) * of_route(z[i, j], F.linear(x, w).to(acc))

    return tuple(torch.stack([term(i, j) for j in range(num_inputs)]).sum(0).to(u[0].dtype) for i in range(z.shape[0]))
