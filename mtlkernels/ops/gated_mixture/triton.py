"""Gated mixture on NVIDIA GPUs: one launch forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._triton import DTYPES, Table, Tile, contiguous, launch
from mtlkernels.ops.activations import from_input
from mtlkernels.ops.gated_mixture.triton_kernels import mix_backward, mix_forward

# 2,048 elements a tile: two 16-byte loads a thread in half precision, and few enough registers for several programs on
# a multiprocessor (8 or more forward, 4 backward), whose loads hide each other's latency.
# Without alignment every element needs an address of its own, in registers: half the columns.
TILES = {
    True: Tile(rows=16, columns=128, depth=1, warps=4, stages=1),
    False: Tile(rows=16, columns=64, depth=1, warps=4, stages=1),
}


def strides(table: Table, tensor: Tensor | None, row: int, expert: int) -> int:
    """Appends where the experts' features are: address, stride along dimensions ``row`` and ``expert``."""
    start = table.pointers([tensor])
    if tensor is None:
        table.integers((0, 0))
    else:
        table.integers((tensor.stride(row), tensor.stride(expert)))
    return start


def seen_entries(table: Table, gate_experts: Sequence[int], gate_sizes: Sequence[int], num_experts: int) -> int:
    """Appends which gates mix each expert: E + 1 offsets, the gates, and their places in ``gate_experts``."""
    owners = [k for k, size in enumerate(gate_sizes) for _ in range(size)]
    order = sorted(range(len(gate_experts)), key=lambda member: gate_experts[member])
    offsets = [0] * (num_experts + 1)
    for expert in gate_experts:
        offsets[expert + 1] += 1
    for e in range(num_experts):
        offsets[e + 1] += offsets[e]
    start = table.integers(offsets)
    table.integers(owners[member] for member in order)
    table.integers(order)
    return start


def forward(
    experts: Tensor, gate_logits: Sequence[Tensor], gate_experts: Sequence[int], gate_sizes: Sequence[int]
) -> list[Tensor]:
    """As the reference: K tensors [B, H] of the dtype of ``experts``."""
    experts = experts if experts.stride(2) == 1 else experts.contiguous()
    table = Table()
    at = strides(table, experts, 0, 1)
    shape = (experts.shape[0], experts.shape[2])
    aligned = _triton.aligned([experts], experts.stride()[:2] + shape[1:])
    outputs, run = prepare_forward(table, aligned, at, experts, shape, gate_logits, gate_experts, gate_sizes)
    with _triton.on_device(experts.device):
        run(table.to(experts.device))
    return outputs


def prepare_forward(
    table: Table,
    aligned: bool,
    experts: int,
    like: Tensor,
    shape: tuple[int, int],
    gate_logits: Sequence[Tensor],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
) -> tuple[list[Tensor], Callable[[Tensor], None]]:
    """The outputs, of ``shape`` [B, H], and what fills them once the table is complete and on the device.

    ``experts`` is a place in the table, see :func:`strides`.
    """
    num_rows, width = shape
    outputs = [like.new_empty(shape) for _ in gate_sizes]
    gates = _triton.gate_entries(table, gate_logits, gate_experts, gate_sizes)
    at_outputs = table.pointers(outputs)
    tile = TILES[aligned]

    def run(entries: Tensor) -> None:
        launch(
            mix_forward,
            triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns),
            tile,
            entries,
            at_outputs,
            gates,
            experts,
            len(gate_sizes),
            num_rows,
            width,
            DTYPE=DTYPES[like.dtype],
            LOGITS=DTYPES[gate_logits[0].dtype],
            ALIGNED=aligned,
        )

    return outputs, run


def backward(
    grad_outputs: Sequence[Tensor],
    experts: Tensor,
    gate_logits: Sequence[Tensor],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    need_experts: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference: the gradients of the experts [B, E, H] and of each gate's logits."""
    experts = experts if experts.stride(2) == 1 else experts.contiguous()
    grad_experts = torch.empty_like(experts, memory_format=torch.contiguous_format) if need_experts else None
    table = Table()
    saved, grads = strides(table, experts, 0, 1), strides(table, grad_experts, 0, 1)
    grad_outputs = contiguous(grad_outputs)
    aligned = _triton.aligned([experts, *grad_outputs], (*experts.stride()[:2], experts.shape[2]))
    gates = (gate_logits, gate_experts, gate_sizes)
    grad_logits, run = prepare_backward(
        table, aligned, saved, grads, experts.shape[1], 0, grad_outputs, *gates, need_experts, need_logits
    )
    with _triton.on_device(experts.device):
        run(table.to(experts.device))
    return [] if grad_experts is None else [grad_experts], grad_logits


def prepare_backward(
    table: Table,
    aligned: bool,
    saved: int,
    grad_experts: int,
    num_experts: int,
    code: int,
    grad_outputs: Sequence[Tensor],
    gate_logits: Sequence[Tensor],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    need_experts: bool,
    need_logits: bool,
    grad_logits: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Callable[[Tensor], None]]:
    """The logits' gradients, and what fills them and the experts' once the table is complete and on the device.

    ``grad_outputs`` are contiguous. ``saved`` and ``grad_experts`` are places in the table, see :func:`strides`;
    ``code`` is the activation that the experts end with. ``grad_logits``: where the logits' gradients go, in rows that
    may be longer than the logits', and are filled with zeros; None makes new tensors.
    """
    if grad_logits is None or not need_logits:
        grad_logits = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in gate_logits if need_logits]
    num_rows, width = grad_outputs[0].shape
    members, tile = len(gate_experts), TILES[aligned]
    blocks = triton.cdiv(width, tile.columns) if need_logits else 0
    weights = grad_outputs[0].new_empty((members, num_rows), dtype=torch.float32)
    inner = grad_outputs[0].new_empty((blocks, members, num_rows), dtype=torch.float32)
    gates = _triton.gate_entries(table, gate_logits, gate_experts, gate_sizes)
    seen = seen_entries(table, gate_experts, gate_sizes, num_experts)
    at_outputs = table.pointers(grad_outputs)
    at_logits = table.pointers(grad_logits)
    table.integers(t.stride(0) for t in grad_logits)
    table.integers(t.shape[1] for t in grad_logits)

    def run(entries: Tensor) -> None:
        launch(
            mix_backward,
            triton.cdiv(num_rows, tile.rows),
            tile,
            entries,
            weights,
            inner,
            at_outputs,
            gates,
            seen,
            saved,
            grad_experts,
            at_logits,
            len(gate_sizes),
            num_experts,
            members,
            num_rows,
            width,
            DTYPE=DTYPES[grad_outputs[0].dtype],
            LOGITS=DTYPES[gate_logits[0].dtype],
            ALIGNED=aligned,
            CODE=code,
            FROM_INPUT=from_input(code),
            NEED_EXPERTS=need_experts,
            NEED_LOGITS=need_logits,
        )

    return list(grad_logits), run
