"""Compiles every kernel in every configuration that is shipped, without a GPU, and shows what each one uses.

    python -m tests.triton.aot [--arch 80 90 100] [--kernel NAME ...] [--activations] [--gates]

A row a kernel, configuration and architecture: registers a thread, bytes of stack (spilled registers), bytes of shared
memory, and the number of tensor-core instructions. Fails if anything spills, or does not compile.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from mtlkernels.ops.expert_mixture import triton_gradients as gradients
from mtlkernels.ops.expert_mixture import triton_kernels as experts
from mtlkernels.ops.expert_mixture import triton_tiles as tiles
from mtlkernels.ops.normalized_mixture import triton_dice as dices
from mtlkernels.ops.normalized_mixture import triton_gradients as norm_gradients
from mtlkernels.ops.normalized_mixture import triton_kernels as norms
from mtlkernels.ops.normalized_mixture import triton_tiles as norm_tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtlkernels.ops._triton import Tile
from mtlkernels.ops.activations import CODES, DICE, from_input, has_slopes
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.gated_mixture import triton_kernels as mixtures
from mtlkernels.ops.pcgrad import triton as pcgrad
from mtlkernels.ops.pcgrad import triton_gram as grams
from mtlkernels.ops.pcgrad import triton_kernels as projections
from mtlkernels.ops.snr_aver import triton_kernels as averages
from mtlkernels.ops.snr_trans import triton as routes
from mtlkernels.ops.snr_trans import triton_kernels as transforms

MODULES = (experts, gradients, mixtures, norms, norm_gradients, dices, grams, projections, transforms, averages)
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# dtype and input_precision of every product.
OPERANDS = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee"))
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = ((1, 1), (4096, 16), (4096, 4096))  # rows and columns that between them lead to every tile of a product
# gelu takes the most registers, but its derivative is computed in smaller tiles than those that follow from the output.
# Of the activations with slopes, which only the normalized mixture has, dice takes the most.
FORWARD_CODES = (CODES["gelu"], DICE)
BACKWARD_CODES = (CODES["tanh"], CODES["gelu"], DICE)
TASKS = (*range(1, 9), 12, 16, 32, 64)  # every size of a group, and of a projection
# The types of a kernel's arguments but for those that are i32.
DROPOUT = {"table": "*i64", "threshold": "i64", "factor": "fp32", "eps": "fp32"}
ARGUMENTS = {
    "normalized_layer": DROPOUT,
    "normalize": DROPOUT,
    "norm_sums": DROPOUT,
    "preactivation_gradient": DROPOUT,
    "layer_norm_gradient": DROPOUT,
    "dice_rows": {**DROPOUT, "dice_eps": "fp32"},
    "dice_gradient_rows": DROPOUT,
    "mix_backward": {"table": "*i64", "weights": "*fp32", "inner": "*fp32"},
    "gram_chunks": {"table": "*i64", "parts": "*fp64"},
    "gram_sum": {"parts": "*fp64", "gram": "*fp64"},
    "project_tasks": {
        "gram": "*fp64",
        "order": "*i64",
        "rows": "*fp64",
        "coefficients": "*fp64",
        "max_norm": "i64",
        "eps": "i64",
    },
    "combine_chunks": {"table": "*i64", "coefficients": "*fp64"},
    "open_routes": {"z": "*fp32", "lists": "*i32"},
    "route_sum": {"table": "*i64", "z": "*fp32", "lists": "*i32"},
    "route_products": {"table": "*i64", "z": "*fp32", "inner_products": "*fp32"},
    "average_sum": {"table": "*i64", "z": "*fp32", "lists": "*i32"},
    "route_dots": {"table": "*i64", "z": "*fp32", "inner_products": "*fp32"},
}


@dataclass(frozen=True)
class Variant:
    """A kernel with a launch configuration; ``constants`` are its compile-time arguments but for the tile."""

    kernel: str
    tile: Tile
    constants: tuple[tuple[str, Any], ...]

    @property
    def dtype(self) -> str:
        return str(dict(self.constants).get("DTYPE", ""))

    def __str__(self) -> str:
        short = " ".join(f"{name.lower()}={value}" for name, value in self.constants)
        tile = self.tile
        return f"{self.kernel} {tile.rows}x{tile.columns}x{tile.depth} warps={tile.warps} stages={tile.stages} {short}"


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes; ``error`` is empty unless it did not compile."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    error: str = ""

    @property
    def fails(self) -> bool:
        return bool(self.error) or self.stack > 0


def every_variant(
    forward_codes: Sequence[int], backward_codes: Sequence[int], every_gate: bool = False
) -> Iterator[Variant]:
    """Every shipped configuration, with these activations in the kernels of the two directions.

    Of the numbers of gates that a tile serves, the fewest and the most unless ``every_gate``.
    """
    without_slopes = ([code for code in codes if not has_slopes(code)] for codes in (forward_codes, backward_codes))
    yield from mixture_variants(*without_slopes, every_gate)
    yield from norm_variants(forward_codes, backward_codes)
    yield from pcgrad_variants()
    yield from snr_variants()


def mixers(choice: tiles.Mixers, every_gate: bool) -> Iterator[tuple[Tile, int]]:
    """The tiles of the last layer's kernel, each with numbers of gates that it serves."""
    most = tiles.MAX_FUSED_GATES
    for tile, low, high in ((choice.short, 1, most), (choice.full, 1, choice.few), (choice.many, choice.few + 1, most)):
        for gates in range(low, high + 1, 1 if every_gate else max(high - low, 1)):
            yield tile, gates


def mixture_variants(
    forward_codes: Sequence[int], backward_codes: Sequence[int], every_gate: bool
) -> Iterator[Variant]:
    """Every configuration of the mixtures' kernels."""

    def made(kernel: str, tile: Tile, dtype: str, **constants: Any) -> Variant:
        return Variant(kernel, tile, (("DTYPE", dtype), *constants.items()))

    for aligned in (True, False):
        for dtype in TORCH_DTYPES:
            # float32 logits take no fewer registers than narrower ones.
            common: dict[str, Any] = {"LOGITS": "fp32", "ALIGNED": aligned}
            yield made("mix_forward", mixture.TILES[aligned], dtype, **common)
            for code in backward_codes:
                what = {"CODE": code, "FROM_INPUT": from_input(code), "NEED_EXPERTS": True, "NEED_LOGITS": True}
                yield made("mix_backward", mixture.TILES[aligned], dtype, **common, **what)
        for dtype, precision in OPERANDS:
            key = tiles.operands(TORCH_DTYPES[dtype], precision), aligned
            common = {"ALIGNED": aligned, "PRECISION": precision, "UPCAST": False}
            products = tiles.PRODUCT[key]
            for code in forward_codes:
                for tile, gates in itertools.product(products, (False, True)):
                    what = {"CODE": code, "KEEP": from_input(code), "GATE_LAYERS": gates}
                    chosen = tiles.beside_gates(tile) if gates else tile
                    yield made("layer_forward", chosen, dtype, **common, **what)
                what = {"LOGITS": "fp32", "CODE": code, "FROM_INPUT": from_input(code), "KEEP": True}
                for tile, gates in mixers(tiles.MIXING[key], every_gate):
                    for split in (False, True):
                        yield made("last_forward", tile, dtype, **common, **what, GATES=gates, SPLIT=split)
            # Only sums over the readers of an input are split, with gates or without, and no activation is in front.
            ways = ((False, False), (False, True), (True, False), (True, True))
            for code, gates, split in (
                *((code, False, False) for code in backward_codes),
                *((0, *way) for way in ways),
            ):
                for rows, columns in SIZES:
                    tile = tiles.product(*key, rows, columns, from_input(code))
                    what = {"CODE": code, "ACTIVATED": from_input(code), "GATE_LAYERS": gates, "SPLIT": split}
                    yield made("input_gradient", tile, dtype, **common, **what)
            for gates, split in ways:
                what = {"NEED_WEIGHTS": True, "NEED_BIASES": True, "GATE_LAYERS": gates, "SPLIT": split}
                yield made("weight_gradient", tiles.WEIGHT_GRADIENT[key], dtype, **common, **what)


def norm_variants(forward_codes: Sequence[int], backward_codes: Sequence[int]) -> Iterator[Variant]:
    """Every configuration of the normalized mixture's kernels, with dropout, which takes registers."""
    yield Variant("batch_statistics", norm_tiles.TOTALS, ())
    for dtype in TORCH_DTYPES:
        yield Variant("norm_totals", norm_tiles.TOTALS, (("SCALES", dtype), ("SUMS", 3)))
        yield Variant("slope_totals", norm_tiles.SLOPES, (("SCALES", dtype),))
    for aligned in (True, False):
        values, sums = norm_tiles.VALUES[aligned], norm_tiles.SUMS[aligned]
        for dtype, norm in itertools.product(TORCH_DTYPES, (0, 1, 2)):
            common: tuple[tuple[str, Any], ...] = (("DTYPE", dtype), ("ALIGNED", aligned))
            styles = (*common, ("SCALES", "fp32"), ("DROPS", True))
            if norm == 2:
                yield Variant("layer_statistics", values, common)
            for keeps in (True, False):
                yield Variant("dice_rows", values, (*styles, ("NORM", norm), ("CODE", DICE), ("HIDDEN", keeps)))
            yield Variant("dice_gradient_rows", values, (*styles, ("NORM", norm), ("CODE", DICE)))
            for code in forward_codes:
                yield Variant("normalize", values, (*styles, ("NORM", norm), ("CODE", code)))
            for code in backward_codes:
                what = (*styles, ("CODE", code), ("FROM_INPUT", from_input(code)))
                if norm != 0 or has_slopes(code):  # without either there are no sums
                    yield Variant("norm_sums", sums, (*what, ("NORM", norm)))
                if norm == 2:
                    yield Variant("layer_norm_gradient", values, what)
                else:
                    yield Variant("preactivation_gradient", values, (*what, ("NORM", norm)))
        for (dtype, precision), norm, statistics in itertools.product(OPERANDS, (0, 1, 2), (True, False)):
            tile = norm_tiles.LAYER[tiles.operands(TORCH_DTYPES[dtype], precision), aligned]
            common = (("DTYPE", dtype), ("ALIGNED", aligned), ("PRECISION", precision), ("UPCAST", False))
            for code, drops in (*((code, True) for code in forward_codes), (0, False)):
                what = (("SCALES", "fp32"), ("NORM", norm), ("CODE", code), ("DROPS", drops))
                yield Variant("normalized_layer", tile, (*common, *what, ("STATISTICS", statistics)))


def pcgrad_variants() -> Iterator[Variant]:
    """Every configuration of PCGrad's kernels, for products in float64 and in float32."""
    for dtype, torch_dtype in (TORCH_DTYPES | {"fp64": torch.float64}).items():
        for group, single in dict.fromkeys((pcgrad.group_size(t), t <= pcgrad.MAX_GROUP) for t in TASKS):
            for wide in (True, False) if dtype != "fp64" else (True,):
                constants = (("DTYPE", dtype), ("WIDE", wide), ("GROUP", group), ("SINGLE", single))
                yield Variant("gram_chunks", pcgrad.gram_tile(torch_dtype, wide, single), constants)
        yield Variant("combine_chunks", pcgrad.COMBINE, (("DTYPE", dtype),))
    yield Variant("gram_sum", pcgrad.SUM, ())
    flags = (("CLIP", True), ("NORMALIZE", True), ("INCLUDE_SELF", False), ("MEAN", True))
    for tile in dict.fromkeys(map(pcgrad.projection_tile, TASKS)):
        yield Variant("project_tasks", tile, flags)


def snr_variants() -> Iterator[Variant]:
    """Every configuration of SNR's kernels, for up to 16 sub-networks on either side."""
    yield Variant("open_routes", Tile(1, 16, 1, 1, 1), ())
    for aligned in (True, False):
        for dtype in TORCH_DTYPES:
            common: tuple[tuple[str, Any], ...] = (("DTYPE", dtype), ("ALIGNED", aligned))
            yield Variant("average_sum", mixture.TILES[aligned], common)
            yield Variant("route_dots", mixture.TILES[aligned], (*common, ("CLOSED_GRAD", False)))
        for dtype, precision in OPERANDS:
            key = tiles.operands(TORCH_DTYPES[dtype], precision), aligned
            common = (("DTYPE", dtype), ("ALIGNED", aligned), ("PRECISION", precision), ("UPCAST", False))
            for tile in routes.SUM[key]:
                for transposed in (False, True):
                    yield Variant("route_sum", tile, (*common, ("TRANSPOSED", transposed)))
            wanted = (("NEED_WEIGHTS", True), ("NEED_Z", True), ("CLOSED_GRAD", True))
            yield Variant("route_products", routes.PRODUCT[key], (*common, *wanted))


def compile_variant(variant: Variant, architecture: int) -> Usage:
    """Compiles for an architecture (80, 90, …) and reads from the machine code what it takes."""
    kernel = next(found for m in MODULES if (found := getattr(m, variant.kernel, None)) is not None)
    tile = variant.tile
    values = dict(variant.constants) | {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    constants = {name: DTYPES.get(v, v) if name in ("DTYPE", "LOGITS", "SCALES") else v for name, v in values.items()}
    types = ARGUMENTS.get(variant.kernel, {"table": "*i64"})
    signature = {
        parameter.name: "constexpr" if parameter.is_constexpr else types.get(parameter.name, "i32")
        for parameter in kernel.params
    }
    pointers = [i for i, parameter in enumerate(kernel.params) if signature[parameter.name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # whatever the compiler raises is this row's result
        return Usage(error=f"{type(error).__name__}: {error}".splitlines()[0])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        return Usage(error="cuobjdump shows no resource usage")
    instructions = len(re.findall(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b", code))
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared, instructions)


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def _compile(task: tuple[Variant, int]) -> Usage:
    return compile_variant(*task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--activations", action="store_true", help="every activation, not only tanh, gelu and dice")
    parser.add_argument("--gates", action="store_true", help="every number of gates, not only the fewest and the most")
    args = parser.parse_args()
    every = range(len(CODES))
    codes = (every, every) if args.activations else (FORWARD_CODES, BACKWARD_CODES)
    found = dict.fromkeys(v for v in every_variant(*codes, args.gates) if not args.kernel or v.kernel in args.kernel)
    tasks = [(variant, architecture) for variant in found for architecture in args.arch]
    failures = 0
    print("arch  registers  stack  shared  tensor-core  kernel")
    with ProcessPoolExecutor(2) as pool:
        for (variant, architecture), usage in zip(tasks, pool.map(_compile, tasks, chunksize=4), strict=True):
            failures += usage.fails
            figures = f"{usage.registers:>9}  {usage.stack:>5}  {usage.shared:>6}  {usage.tensor_core:>11}"
            print(f"{architecture:>4}  {figures}  {variant}  {usage.error}".rstrip(), flush=True)
    print(f"{len(tasks)} compiled for {', '.join(f'sm_{a}' for a in args.arch)}: {failures} spill or fail")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
