"""SNR-Trans on NVIDIA GPUs.

A small launch lists the open routes on the device, so that nothing waits for it; then one launch forward, and backward
one for the gradients of u and one for those of the weights and of z. Programs of closed routes end at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._checks import shape_of
from mtlkernels.ops._operands import check_count, check_operands
from mtlkernels.ops._triton import Kind, Table, Tile, contiguous, launch
from mtlkernels.ops.level.triton.tiles import WEIGHT_GRADIENT
from mtlkernels.ops.snr_trans import triton_kernels as kernels
from mtlkernels.ops.snr_trans.reference import matrices


class Sums(NamedTuple):
    """Tiles of a sum over routes: for few rows, and otherwise."""

    short: Tile
    full: Tile


# As a level's products, but with two accumulators: the sum, and the product that z has yet to scale.
SUM = {
    ("half", True): Sums(Tile(16, 64, 128, 4, 3), Tile(128, 128, 64, 8, 3)),
    ("tf32", True): Sums(Tile(16, 64, 64, 4, 2), Tile(128, 64, 32, 8, 3)),
    ("ieee", True): Sums(Tile(16, 32, 32, 4, 3), Tile(64, 32, 32, 4, 2)),
    ("half", False): Sums(Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2)),
    ("tf32", False): Sums(Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2)),
    ("ieee", False): Sums(Tile(16, 32, 32, 4, 2), Tile(32, 32, 16, 4, 2)),
}
# Without tensor cores a product and a tile of the weight beside it take more registers than four warps have.
PRODUCT = {**WEIGHT_GRADIENT, ("ieee", True): Tile(64, 64, 16, 8, 2)}


def check_routes(u: Sequence[Tensor], z: Tensor) -> None:
    """Refuses streams and routes that the C++ kernels refuse."""
    if not u or u[0].dim() != 2 or u[0].dtype not in _triton.DTYPES:
        raise TypeError("u must hold at least one matrix [B, D] in float32, bfloat16 or float16")
    check_operands("u", u, [(u[0].shape[0], x.shape[-1]) for x in u], u[0])
    if z.dim() != 2 or z.shape[0] == 0 or z.shape[1] != len(u):
        raise ValueError(f"z must have shape [I, {len(u)}], got {shape_of(z)}")
    if z.dtype not in _triton.DTYPES:
        raise TypeError(f"z must be float32 or narrower beside u in {u[0].dtype}, got {z.dtype}")
    check_operands("z", [z], [tuple(z.shape)], u[0], (z.dtype,))


def _check(u: Sequence[Tensor], weights: Sequence[Tensor], z: Tensor) -> list[int]:
    """The outputs' widths, once all operands are what kernels read."""
    check_routes(u, z)
    outputs, inputs = z.shape
    if len(weights) == 1 and weights[0].dim() == 4:
        shape = (outputs, inputs, weights[0].shape[2], u[0].shape[1])
        check_operands("weights", weights, [shape], u[0])
        check_operands("u", u, [tuple(u[0].shape)] * inputs, u[0])
        return [shape[2]] * outputs
    check_count("weights", weights, outputs * inputs, "routes")
    widths = [weight.shape[0] for weight in weights[::inputs]]
    check_operands("weights", weights, [(width, x.shape[1]) for width in widths for x in u], u[0])
    return widths


class Lists:
    """z in float32, and the open routes, found on the device: by output, then by input."""

    def __init__(self, z: Tensor) -> None:
        self.num_outputs, self.num_inputs = z.shape
        self.z = z.float().contiguous()
        size = self.num_outputs * (self.num_inputs + 1) + self.num_inputs * (self.num_outputs + 1)
        self.entries = torch.empty(size, dtype=torch.int32, device=z.device)
        tile = Tile(1, triton.next_power_of_2(max(z.shape)), 1, 1, 1)
        programs = self.num_outputs + self.num_inputs
        launch(kernels.open_routes, programs, tile, self.z, self.entries, self.num_outputs, self.num_inputs)

    def of(self, transposed: bool) -> tuple[int, int, int, int, int]:
        """One direction: where its lists start, numbers of inputs and outputs, a route's stride by input and output."""
        outputs, inputs = self.num_outputs, self.num_inputs
        if transposed:
            return outputs * (inputs + 1), outputs, inputs, inputs, 1
        return 0, inputs, outputs, 1, inputs


def entries(table: Table, tensors: Sequence[Tensor]) -> int:
    """Appends addresses and widths of matrices, and returns where they start."""
    start = table.pointers(tensors)
    table.integers(t.shape[1] for t in tensors)
    return start


def _sum(
    table: Table,
    lists: Lists,
    transposed: bool,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: int,
    kind: Kind,
) -> Callable[[Tensor], None]:
    """What runs ``route_sum`` once the table is on the device."""
    at_inputs, at_outputs = entries(table, inputs), entries(table, outputs)
    rows, sums = inputs[0].shape[0], SUM[kind.operands]
    tile = sums.short if rows <= 2 * sums.short.rows else sums.full
    blocks = max(triton.cdiv(v.shape[1], tile.columns) for v in outputs)
    members, num_inputs, num_outputs, *route_strides = lists.of(transposed)
    programs = triton.cdiv(rows, tile.rows) * num_outputs * blocks
    numbers = (members, at_inputs, at_outputs, weights, num_inputs, num_outputs, rows, blocks, *route_strides)

    def run(found: Tensor) -> None:
        tensors = (found, lists.z, lists.entries)
        launch(kernels.route_sum, programs, tile, *tensors, *numbers, KIND=kind, TRANSPOSED=transposed)

    return run


def forward(u: Sequence[Tensor], weights: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    """As the reference: I tensors [B, D_out_i]."""
    _check(u, weights, z)
    u, matrix = contiguous(u), matrices(contiguous(weights))
    outputs = [u[0].new_empty((u[0].shape[0], w.shape[0])) for w in matrix[:: len(u)]]
    aligned = _triton.aligned((*u, *matrix), (t.shape[1] for t in (*u, *outputs)))
    with _triton.on_device(z.device):
        table, lists = Table(), Lists(z)
        run = _sum(table, lists, False, u, outputs, table.pointers(matrix), Kind.of(u[0].dtype, aligned))
        run(table.to(z.device))
    return outputs


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
    """As the reference: gradients of u, of the weights in the form that they have, and of z."""
    widths = _check(u, weights, z)
    check_count("grad_outputs", grad_outputs, len(widths), "outputs")
    check_operands("grad_outputs", grad_outputs, [(u[0].shape[0], width) for width in widths], u[0])
    u, weights, grads = contiguous(u), contiguous(weights), contiguous(grad_outputs)
    matrix = matrices(weights)
    aligned = _triton.aligned((*u, *matrix, *grads), (t.shape[1] for t in (*u, *grads)))
    kind = Kind.of(u[0].dtype, aligned)
    grad_u = [torch.empty_like(x) for x in u] if need_u else []
    grad_weights = [torch.empty_like(w) for w in weights] if need_weights else []
    grad_z: list[Tensor] = []
    with _triton.on_device(z.device):
        table, lists = Table(), Lists(z)
        at_weights = table.pointers(matrix)
        run = _sum(table, lists, True, grads, grad_u, at_weights, kind) if need_u else None
        at_grads, at_inputs = entries(table, grads), entries(table, u)
        at_outputs = table.pointers(matrices(grad_weights)) if need_weights else 0
        found = table.to(z.device)
        if run is not None:
            run(found)
        tile = PRODUCT[kind.operands]
        row_blocks = max(triton.cdiv(v.shape[1], tile.rows) for v in grads)
        column_blocks = max(triton.cdiv(x.shape[1], tile.columns) for x in u)
        blocks = row_blocks * column_blocks
        inner_products = lists.z.new_empty((z.numel(), blocks)) if need_z else lists.z
        tensors, places = (found, lists.z, inner_products), (at_grads, at_inputs, at_weights, at_outputs)
        sizes = (lists.num_outputs, lists.num_inputs, u[0].shape[0], row_blocks, column_blocks)
        wanted = {"NEED_WEIGHTS": need_weights, "NEED_Z": need_z, "CLOSED_GRAD": closed_grad}
        programs = z.numel() * blocks if need_weights or need_z else 0
        launch(kernels.route_products, programs, tile, *tensors, *places, *sizes, KIND=kind, **wanted)
        if need_z:
            grad_z.append(inner_products.sum(1).view(z.shape).to(z.dtype))
    return grad_u + grad_weights + grad_z
