"""SNR-Aver on NVIDIA GPUs: a launch that lists the open routes on the device, one for sums, one for gradients of z."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._operands import check_count, check_operands
from mtlkernels.ops._triton import Kind, Table, contiguous, launch
from mtlkernels.ops.gated_mixture.triton import TILES
from mtlkernels.ops.snr_aver.triton_kernels import average_sum, route_dots
from mtlkernels.ops.snr_trans.triton import Lists, check_routes


def _sum(found: Tensor, lists: Lists, transposed: bool, inputs: int, outputs: int, like: Tensor, kind: Kind) -> None:
    tile = TILES[kind.aligned]
    members, num_inputs, num_outputs, *route_strides = lists.of(transposed)
    programs = triton.cdiv(like.shape[0], tile.rows) * triton.cdiv(like.shape[1], tile.columns)
    numbers = (members, inputs, outputs, num_inputs, num_outputs, *like.shape, *route_strides)
    launch(average_sum, programs, tile, found, lists.z, lists.entries, *numbers, KIND=kind)


def _check(u: Sequence[Tensor], z: Tensor) -> None:
    check_routes(u, z)
    check_operands("u", u, [tuple(u[0].shape)] * len(u), u[0])


def forward(u: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    """As the reference: I tensors [B, D]."""
    _check(u, z)
    u = contiguous(u)
    outputs = [torch.empty_like(u[0]) for _ in range(z.shape[0])]
    kind = Kind.of(u[0].dtype, _triton.aligned(u, u[0].shape[1:])).without_products
    with _triton.on_device(z.device):
        table, lists = Table(), Lists(z)
        at_inputs, at_outputs = table.pointers(u), table.pointers(outputs)
        _sum(table.to(z.device), lists, False, at_inputs, at_outputs, u[0], kind)
    return outputs


def backward(
    grad_outputs: Sequence[Tensor], u: Sequence[Tensor], z: Tensor, need_u: bool, need_z: bool, closed_grad: bool
) -> list[Tensor]:
    """As the reference: gradients of u and of z."""
    _check(u, z)
    check_count("grad_outputs", grad_outputs, z.shape[0], "outputs")
    check_operands("grad_outputs", grad_outputs, [tuple(u[0].shape)] * len(grad_outputs), u[0])
    u, grads = contiguous(u), contiguous(grad_outputs)
    grad_u = [torch.empty_like(x) for x in u] if need_u else []
    grad_z: list[Tensor] = []
    kind = Kind.of(u[0].dtype, _triton.aligned((*u, *grads), u[0].shape[1:])).without_products
    with _triton.on_device(z.device):
        table, lists = Table(), Lists(z)
        at_inputs, at_grads, at_grad_u = table.pointers(u), table.pointers(grads), table.pointers(grad_u)
        found = table.to(z.device)
        if need_u:
            _sum(found, lists, True, at_grads, at_grad_u, u[0], kind)
        if need_z:
            tile = TILES[kind.aligned]
            programs = triton.cdiv(u[0].shape[0], tile.rows)
            inner_products = lists.z.new_empty((z.numel(), programs))
            numbers = (at_grads, at_inputs, *z.shape, *u[0].shape, programs)
            tensors = (found, lists.z, inner_products)
            launch(route_dots, programs, tile, *tensors, *numbers, KIND=kind, CLOSED_GRAD=closed_grad)
            grad_z.append(inner_products.sum(1).view(z.shape).to(z.dtype))
    return grad_u + grad_z
