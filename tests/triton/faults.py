"""What a compiled kernel must be before it is shipped, read from its machine code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu_model.cubin import Cubin
from benchmarks.gpu_model.sass import Code, Instruction
from mtlkernels.ops._triton import Kind, Tile

# The shared memory that a program can have, in bytes (CUDA's programming guide, "Technical Specifications").
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS = 65536  # of a multiprocessor
WARP = 32
# The products of an architecture's tensor cores that a group of 4 warps with 64 rows between them starts together.
GROUP_PRODUCTS = {90: r"HGMMA", 100: r"UTC\w*MMA"}
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
GROUP_ROWS, GROUP_WARPS = 64, 4
COPY_BYTES = 16
NARROW = 1 / 8  # of what is copied: the columns of a few gates are less than all threads copy by 16 bytes each


def faults(tile: Tile, constants: Mapping[str, Any], cubin: Cubin, architecture: int) -> Iterator[str]:
    """What is wrong with a kernel that was compiled for an architecture (80, 90, …), in words."""
    if cubin.stack:
        yield f"{cubin.stack} bytes of registers spilled"
    if cubin.shared > SHARED[architecture]:
        yield f"more shared memory than the {SHARED[architecture]} bytes that there are"
    if cubin.registers * tile.warps * WARP > REGISTERS:
        yield f"more registers than the {REGISTERS} of a multiprocessor"
    code = Code(cubin.sass)
    kind = constants.get("KIND")
    if isinstance(kind, Kind) and kind.precision:  # which kernels with products alone have
        yield from _product_faults(tile, kind, code, architecture)
    yield from _counter_faults(code, shares=bool(constants.get("SPLIT")))


def _product_faults(tile: Tile, kind: Kind, code: Code, architecture: int) -> Iterator[str]:
    """The widest products that there are, and beside them copies of 16 bytes where addresses allow that."""
    names = {i.name for i in code.instructions if TENSOR_CORE.fullmatch(i.name)}
    if kind.operands[0] != "ieee" and not names:
        yield "no products of tensor cores"
    wide = GROUP_PRODUCTS.get(architecture)
    fills_a_group = tile.rows >= GROUP_ROWS and tile.warps >= GROUP_WARPS
    if wide and names and fills_a_group and not any(re.fullmatch(wide, name) for name in names):
        yield f"products of single warps, {', '.join(sorted(names))}, where a group of warps has {wide}"
    # Wide products in TF32 read operands from shared memory by rows of the depth alone: others are turned on their way.
    turned = kind.operands[0] == "tf32" and wide is not None
    if names and kind.aligned and not turned:  # where there are none, arithmetic takes far longer than copies
        copies = [i.bytes for i in code.instructions if i.name == "LDGSTS"]
        narrow = [count for count in copies if count < COPY_BYTES]
        if sum(narrow) > NARROW * sum(copies):
            yield f"{len(narrow)} copies of fewer than {COPY_BYTES} bytes"


def _counter_faults(code: Code, shares: bool) -> Iterator[str]:
    """Around the counter of programs that share a sum, what was written is seen, and what is read is new."""
    places = [at for at, i in enumerate(code.instructions) if i.name in ("ATOM", "ATOMG", "RED")]
    if shares != bool(places):
        yield "no counter of the programs that share a sum" if shares else "an atomic operation that nothing asks for"
    for at in places:
        own = code.instructions[at].predicate
        before = [i for i in code.instructions[:at] if _is_fence(i) and i.predicate in ("", own)]
        after = [i for i in code.instructions[at:] if i.name == "CCTL" and "IVALL" in i.opcode]
        if not before:
            yield "no fence in front of an atomic operation"
        if not after:
            yield "nothing discards the first-level cache behind an atomic operation"


def _is_fence(instruction: Instruction) -> bool:
    return instruction.name == "MEMBAR" and instruction.opcode.endswith((".GPU", ".SYS"))
