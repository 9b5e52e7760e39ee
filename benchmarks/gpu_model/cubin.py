"""Compiles a Triton kernel for an architecture, without a GPU, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtlkernels.ops._triton import Tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The types of a kernel's arguments, whichever it has, but for those that are i32; and those of two with other meanings.
TYPES = {
    "table": "*i64",
    "factor": "fp32",
    "eps": "fp32",
    "dice_eps": "fp32",
    "inner": "*fp32",
    "gram": "*fp64",
    "order": "*i64",
    "rows": "*fp64",
    "coefficients": "*fp64",
    "max_norm": "i64",
    "z": "*fp32",
    "lists": "*i32",
    "inner_products": "*fp32",
}
OTHERS = {
    "mix_backward": {"weights": "*fp32"},
    "gram_chunks": {"parts": "*fp64"},
    "gram_sum": {"parts": "*fp64"},
    "project_tasks": {"eps": "i64"},
}


@dataclass(frozen=True)
class Cubin:
    """What a kernel takes: registers a thread, bytes of stack (spilled) and of shared memory; and its machine code."""

    registers: int
    stack: int
    shared: int
    sass: str


def compile_kernel(kernel: Any, tile: Tile, constants: Mapping[str, Any], architecture: int) -> Cubin:
    """Compiles for an architecture (80, 90, …); ``constants`` are the compile-time arguments but for the tile.

    Raises:
        Exception: whatever the compiler raises.
    """
    constants = dict(constants) | {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    types = TYPES | OTHERS.get(kernel.__name__, {})
    signature = {
        parameter.name: "constexpr" if parameter.is_constexpr else types.get(parameter.name, "i32")
        for parameter in kernel.params
    }
    pointers = [i for i, parameter in enumerate(kernel.params) if signature[parameter.name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise ValueError("cuobjdump shows no resource usage")
    return Cubin(int(found[1]), int(found[2]), compiled.metadata.shared, code)


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
