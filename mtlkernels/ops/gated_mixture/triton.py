"""Gated mixture on NVIDIA GPUs: one launch forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._operands import check_count, check_gate_logits, check_operands
from mtlkernels.ops._triton import DTYPES, Kind, Launch, Run, Table, Tile, contiguous, launch
from mtlkernels.ops.gated_mixture.triton_kernels import mix_backward, mix_forward

# 2,048 elements a tile: two 16-byte loads a thread in half precision, and few enough registers for several programs on
# a multiprocessor (8 or more forward, 4 backward), whose loads hide each other's latency.
# Without alignment every element needs an address of its own, in registers: half the columns, and as many registers as
# gelu's derivative takes, which the compiler otherwise spilled on sm_100 for the sake of more programs.
TILES = {
    True: Tile(rows=16, columns=128, depth=1, warps=4, stages=1),
    False: Tile(rows=16, columns=64, depth=1, warps=4, stages=1, registers=224),
}


def backward_tile(kind: Kind) -> Tile:
    """In half precision half as many rows and warps: by the model of an H100, which waits less for its last programs,
    12 us less than 186 at 65,536 rows of workload A.

    Of float32 with the registers of which three programs have room; left to itself, gelu spilled on sm_120.
    """
    tile = TILES[kind.aligned]
    if kind.aligned:
        tile = replace(tile, registers=168) if kind.dtype == tl.float32 else replace(tile, rows=8, warps=2)
    return tile


class Gates(NamedTuple):
    """K gates: their logits, the experts of all, one gate's after another's, and how many each has."""

    logits: Sequence[Tensor]
    experts: Sequence[int]
    sizes: Sequence[int]

    def entries(self, table: Table) -> int:
        """Appends what kernels know of the gates; see ``gate_logits`` in _triton_functions.py.

        K addresses of logits, K row strides, K column strides, K + 1 offsets into the experts of all gates, these.
        """
        start = table.pointers(self.logits)
        table.integers(logits.stride(0) for logits in self.logits)
        table.integers(logits.stride(1) for logits in self.logits)
        table.integers(sum(self.sizes[:k]) for k in range(len(self.sizes) + 1))
        table.integers(self.experts)
        return start

    def of_experts(self, table: Table, offsets: Sequence[int]) -> int:
        """Appends which gates mix each expert: E + 1 starts, the gates, and their places in ``experts``.

        Then come ``offsets``, from the first of the experts that are stacked to each.
        """
        owners = [k for k, size in enumerate(self.sizes) for _ in range(size)]
        order = sorted(range(len(self.experts)), key=lambda member: self.experts[member])
        sizes = [0] * len(offsets)
        for expert in self.experts:
            sizes[expert] += 1
        start = table.integers(accumulate(sizes, initial=0))
        table.integers(owners[member] for member in order)
        table.integers(order)
        table.integers(offsets)
        return start


def strides(table: Table, tensor: Tensor | None, row: int, expert: int) -> int:
    """Appends where the experts' features are: address, stride along dimensions ``row`` and ``expert``."""
    start = table.pointers([tensor])
    table.integers((0, 0) if tensor is None else (tensor.stride(row), tensor.stride(expert)))
    return start


def _check(
    experts: Tensor, gate_logits: Sequence[Tensor], gate_experts: Sequence[int], gate_sizes: Sequence[int]
) -> None:
    """Refuses what the C++ kernels refuse."""
    if experts.dim() != 3 or experts.dtype not in DTYPES or experts.layout is not torch.strided:
        given = f"{experts.dim()}-D {experts.dtype} of layout {experts.layout}"
        raise TypeError(f"experts must be a dense tensor [B, E, H] in float32, bfloat16 or float16, got {given}")
    if sum(gate_sizes) != len(gate_experts) or not all(0 <= e < experts.shape[1] for e in gate_experts):
        raise ValueError(
            f"gate_experts must name {sum(gate_sizes)} experts in [0, {experts.shape[1]}), got {list(gate_experts)}"
        )
    check_gate_logits(gate_logits, gate_sizes, experts.shape[0], experts)


def forward(
    experts: Tensor, gate_logits: Sequence[Tensor], gate_experts: Sequence[int], gate_sizes: Sequence[int]
) -> list[Tensor]:
    """As the reference: K tensors [B, H] of the dtype of ``experts``."""
    _check(experts, gate_logits, gate_experts, gate_sizes)
    experts = experts if experts.stride(2) == 1 else experts.contiguous()
    table = Table()
    at = strides(table, experts, 0, 1)
    shape = (experts.shape[0], experts.shape[2])
    kind = Kind.of(experts.dtype, _triton.aligned([experts], experts.stride()[:2] + shape[1:]))
    outputs, run = prepare_forward(table, kind, at, experts, shape, Gates(gate_logits, gate_experts, gate_sizes))
    with _triton.on_device(experts.device):
        run(table.to(experts.device))
    return outputs


def prepare_forward(
    table: Table, kind: Kind, experts: int, like: Tensor, shape: tuple[int, int], gates: Gates
) -> tuple[list[Tensor], Run]:
    """The outputs, of ``shape`` [B, H], and what fills them once the table is complete and on the device.

    ``experts`` is a place in the table, see :func:`strides`.
    """
    num_rows, width = shape
    outputs = [table.room(like, shape) for _ in gates.sizes]
    places = (table.pointers(outputs), gates.entries(table), experts)
    tile = TILES[kind.aligned]
    programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns)
    constants = {"KIND": kind.without_products, "LOGITS": DTYPES[gates.logits[0].dtype]}

    def run(entries: Tensor) -> Launch | None:
        return launch(mix_forward, programs, tile, entries, *places, len(gates.sizes), num_rows, width, **constants)

    return outputs, run


def backward(
    grad_outputs: Sequence[Tensor],
    experts: Tensor,
    gate_logits: Sequence[Tensor],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    need_experts: bool,
    need_logits: bool,
) -> list[Tensor]:
    """As the reference: the gradients of the experts [B, E, H] and of each gate's logits."""
    _check(experts, gate_logits, gate_experts, gate_sizes)
    check_count("grad_outputs", grad_outputs, len(gate_sizes), "gates")
    check_operands("grad_outputs", grad_outputs, [(experts.shape[0], experts.shape[2])] * len(gate_sizes), experts)
    experts = experts if experts.stride(2) == 1 else experts.contiguous()
    grad_experts = torch.empty_like(experts, memory_format=torch.contiguous_format) if need_experts else None
    logits = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in gate_logits if need_logits]
    table = Table()
    places = strides(table, experts, 0, 1), strides(table, grad_experts, 0, 1)
    offsets = [e * experts.stride(1) for e in range(experts.shape[1])]
    grad_outputs = contiguous(grad_outputs)
    aligned = _triton.aligned([experts, *grad_outputs], (*experts.stride()[:2], experts.shape[2]))
    gates = Gates(gate_logits, gate_experts, gate_sizes)
    run = prepare_backward(
        table,
        Kind.of(experts.dtype, aligned),
        places,
        offsets,
        0,
        grad_outputs,
        gates,
        need_experts,
        logits,
    )
    with _triton.on_device(experts.device):
        run(table.to(experts.device))
    return logits if grad_experts is None else [grad_experts, *logits]


def prepare_backward(
    table: Table,
    kind: Kind,
    places: tuple[int, int],
    offsets: Sequence[int],
    code: int,
    grad_outputs: Sequence[Tensor],
    gates: Gates,
    need_experts: bool,
    grad_logits: Sequence[Tensor],
) -> Run:
    """What fills the gradients of experts and logits once the table is complete and on the device.

    Args:
        table: the call's.
        kind: of all kernels.
        places: where in the table the experts and their gradients are, see :func:`strides`.
        offsets: those of the E experts among the experts that are stacked; of gradients only E are.
        code: the activation that the experts end with.
        grad_outputs: contiguous.
        gates: which mix these E.
        need_experts: whether the experts' gradients are wanted.
        grad_logits: where the logits' gradients go, in rows that may be longer than the logits', and are filled with
            zeros; empty where they are not wanted.
    """
    num_rows, width = grad_outputs[0].shape
    members, tile = len(gates.experts), backward_tile(kind)
    blocks = triton.cdiv(width, tile.columns) if grad_logits else 0
    weights = table.room(grad_outputs[0], (members, num_rows), torch.float32)
    inner = table.room(grad_outputs[0], (blocks, members, num_rows), torch.float32)
    at = (table.pointers(grad_outputs), gates.entries(table), gates.of_experts(table, offsets), *places)
    at_logits = table.pointers(grad_logits)
    table.integers(t.stride(0) for t in grad_logits)
    table.integers(t.shape[1] for t in grad_logits)
    sizes = (len(gates.sizes), len(offsets), members, num_rows, width)
    constants = {
        "KIND": kind.without_products,
        "LOGITS": DTYPES[gates.logits[0].dtype],
        "CODE": code,
        "NEED_EXPERTS": need_experts,
        "NEED_LOGITS": len(grad_logits) > 0,
    }

    def run(entries: Tensor) -> Launch | None:
        programs = triton.cdiv(num_rows, tile.rows)
        return launch(mix_backward, programs, tile, entries, weights, inner, *at, at_logits, *sizes, **constants)

    return run
