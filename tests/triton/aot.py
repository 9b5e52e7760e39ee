"""Compiles every kernel in every configuration that is shipped, without a GPU, and shows what each one uses.

    python -m tests.triton.aot [--arch 80 90 100] [--kernel NAME ...] [--activations] [--gates] [--triton 3.6.0]

A row a kernel, configuration and architecture: registers a thread, bytes of stack (spilled registers), bytes of shared
memory, and the number of tensor-core instructions. Fails if anything does not compile, or has one of the faults that
``faults.py`` looks for: spills, resources that a card has not, narrow products and copies, counters without fences.

With ``--triton`` another version does so, which is fetched into ``build/triton``. Configurations are chosen for the
newest, so that only what does not compile is a failure then.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from benchmarks.gpu_model.cubin import compile_kernel
from benchmarks.gpu_model.sass import Code
from mtlkernels.ops._triton import DTYPES, Kind, Tile
from mtlkernels.ops._triton_splits import LARGE
from mtlkernels.ops.activations import CODES, DICE, from_input, has_slopes
from mtlkernels.ops.gated_mixture import triton as mixture
from mtlkernels.ops.gated_mixture import triton_kernels as mixtures
from mtlkernels.ops.level.spec import BATCH_NORM, LAYER_NORM, NO_NORM
from mtlkernels.ops.level.triton import (
    chain_kernels,
    dice_kernels,
    gradient_kernels,
    layerwise_gradients,
    layerwise_kernels,
    tiles,
)
from mtlkernels.ops.level.triton.layers import Settings
from mtlkernels.ops.pcgrad import triton as pcgrad
from mtlkernels.ops.pcgrad import triton_gram as grams
from mtlkernels.ops.pcgrad import triton_kernels as projections
from mtlkernels.ops.snr_aver import triton_kernels as averages
from mtlkernels.ops.snr_trans import triton as routes
from mtlkernels.ops.snr_trans import triton_kernels as transforms
from tests.triton.faults import SHARED, TENSOR_CORE, faults

LEVEL = (chain_kernels, gradient_kernels, layerwise_kernels, layerwise_gradients, dice_kernels)
MODULES = (*LEVEL, mixtures, grams, projections, transforms, averages)
# The kinds of kernels without products, and of products.
VALUES = [Kind(dtype, aligned) for aligned in (True, False) for dtype in DTYPES.values()]
PRODUCTS = [kind._replace(precision="ieee") for kind in VALUES]
PRODUCTS += [Kind(tl.float32, aligned, "tf32") for aligned in (True, False)]
SIZES = ((1, 1), (4096, 16), (4096, 4096))  # rows and columns that between them lead to every tile of a product
# gelu takes the most registers, but its derivative is computed in smaller tiles than those that follow from the output.
# Of the activations with slopes, which only layerwise levels have, dice takes the most.
FORWARD_CODES = (CODES["gelu"], DICE)
RELU = CODES["relu"]  # of which hidden layers keep signs
FLAT_CODES = (CODES["leaky_relu"],)  # of those with which the last layer's kernel is one loop over all experts
BACKWARD_CODES = (CODES["tanh"], CODES["gelu"], DICE)
TASKS = (*range(1, 9), 12, 16, 32, 64)  # every size of a group, and of a projection


@dataclass(frozen=True)
class Variant:
    """A kernel with a launch configuration; ``constants`` are its compile-time arguments but for the tile."""

    kernel: str
    tile: Tile
    constants: tuple[tuple[str, Any], ...]

    @property
    def dtype(self) -> str:
        constants = dict(self.constants)
        return str(constants["KIND"].dtype if "KIND" in constants else constants.get("DTYPE", ""))

    def __str__(self) -> str:
        flat = [pair for name, value in self.constants for pair in _flat(name.lower(), value)]
        short = " ".join(f"{name}={value}" for name, value in flat)
        tile = self.tile
        return f"{self.kernel} {tile.rows}x{tile.columns}x{tile.depth} warps={tile.warps} stages={tile.stages} {short}"


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    return zip(value._fields, value, strict=True) if hasattr(value, "_fields") else [(name, value)]


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes; ``error`` is empty unless it did not compile, or must not be shipped."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    error: str = ""


def every_variant(
    forward_codes: Sequence[int], backward_codes: Sequence[int], every_gate: bool = False
) -> Iterator[Variant]:
    """Every shipped configuration, with these activations in the kernels of the two directions.

    Of the numbers of gates that a tile serves, the fewest and the most unless ``every_gate``.
    """
    without_slopes = ([code for code in codes if not has_slopes(code)] for codes in (forward_codes, backward_codes))
    yield from mixture_variants(*without_slopes, every_gate)
    yield from layerwise_variants(forward_codes, backward_codes)
    yield from pcgrad_variants()
    yield from snr_variants()


def mixers(kind: Kind, code: int, every_gate: bool) -> Iterator[tuple[Tile, int]]:
    """The tiles of the last layer's kernel with an activation, each with numbers of gates that it serves."""
    choice, most = tiles.MIXING[kind.operands], tiles.MAX_FUSED_GATES
    if choice.wide and code in FLAT_CODES:
        loops = [choice.wide, *_of(tiles.AHEAD_MIXING, kind)]
        yield from itertools.product(loops, range(1, chain_kernels.FLAT_GATES.value + 1))
    for tile, low, high in ((choice.short, 1, most), (choice.full, 1, choice.few), (choice.many, choice.few + 1, most)):
        for gates in range(low, high + 1, 1 if every_gate else max(high - low, 1)):
            yield tile, gates


def _made(kernel: str, tile: Tile, kind: Kind, **constants: Any) -> Variant:
    return Variant(kernel, tile, (("KIND", kind), *constants.items()))


def mixture_variants(
    forward_codes: Sequence[int], backward_codes: Sequence[int], every_gate: bool
) -> Iterator[Variant]:
    """Every configuration of the kernels of mixtures and of levels that are chains."""
    for kind in VALUES:
        # float32 logits take no fewer registers than narrower ones.
        yield _made("mix_forward", mixture.TILES[kind.aligned], kind, LOGITS=tl.float32)
        for code in backward_codes:
            what = {"LOGITS": tl.float32, "CODE": code, "NEED_EXPERTS": True, "NEED_LOGITS": True}
            yield _made("mix_backward", mixture.backward_tile(kind), kind, **what)
    for kind in PRODUCTS:
        for code in dict.fromkeys((*forward_codes, RELU)):
            for tile, gates in itertools.product(tiles.PRODUCT[kind.operands], (False, True)):
                keep = chain_kernels.INPUTS if from_input(code) else chain_kernels.SIGNS if code == RELU else None
                what = {"CODE": code, "KEEP": keep and keep.value, "LINEAR_GATES": gates}
                yield _made("layer_forward", tiles.roomy(tile) if gates or code == RELU else tile, kind, **what)
        for code in dict.fromkeys((*forward_codes, *FLAT_CODES)):
            what = {"LOGITS": tl.float32, "CODE": code}
            choice = itertools.product(mixers(kind, code, every_gate), (False, True), (False, True))
            for (tile, count), few, split in choice:
                ahead = tile in tiles.AHEAD_MIXING.values()
                keep = not (ahead and split and count == chain_kernels.FLAT_GATES.value)
                what |= {"KEEP": keep, "GATES": count, "FEW": few, "AHEAD": ahead, "SPLIT": split}
                yield _made("last_forward", tile, kind, **what)
        # Only sums over the readers of an input are split, with gates or without, and no activation is in front.
        ways = ((False, False), (False, True), (True, False), (True, True))
        below = ((code, False, False) for code in dict.fromkeys((*backward_codes, RELU)))
        for code, gates, split in (*below, *((0, *way) for way in ways)):
            choice = [tiles.product(kind, rows, columns, from_input(code)) for rows, columns in SIZES]
            large = {0: tiles.LARGE_INPUT, RELU: tiles.LARGE_SIGNS}.get(code, {})
            for tile in (*choice, *_of(large, kind)):
                what = {"CODE": code, "ACTIVATED": from_input(code), "LINEAR_GATES": gates, "SPLIT": split}
                yield _made("input_gradient", tiles.roomy(tile) if gates else tile, kind, **what)
        for tile, gates in itertools.product(even_inputs(kind), (False, True)):
            yield _made("wide_input_gradient", tile, kind, LINEAR_GATES=gates, **tiles.piece_constants(tile))
        for gates, split in ways:
            what = {"NEED_WEIGHTS": True, "NEED_BIASES": True, "LINEAR_GATES": gates, "SPLIT": split}
            for tile in (tiles.WEIGHT_GRADIENT[kind.operands], *_of(tiles.LARGE_WEIGHT, kind)):
                yield _made("weight_gradient", tile, kind, **what)


def even_inputs(kind: Kind) -> list[Tile]:
    """The tiles by which programs share the columns of inputs evenly."""
    found = (
        tiles.even_input(kind, tile, width) for tile in _of(tiles.LARGE_INPUT, kind) for width in range(16, 513, 16)
    )
    return list(dict.fromkeys(tile for tile in found if tile))


def _of(large: Mapping[tuple[str, bool], Tile], kind: Kind) -> list[Tile]:
    """The tile of a large card for these operands, if there is one."""
    return [large[kind.operands]] if kind.operands in large else []


def ships(variant: Variant, architecture: int) -> bool:
    """Whether launchers choose the configuration on that architecture."""
    if variant.tile in tiles.AHEAD_MIXING.values():
        return divmod(architecture, 10) == tiles.AHEAD
    choices = (tiles.LARGE_SIGNS, tiles.LARGE_INPUT, tiles.LARGE_WEIGHT)
    large = {tile for choice in choices for tile in choice.values()}
    if variant.tile in large or variant.kernel == "wide_input_gradient":
        return divmod(architecture, 10) in LARGE
    return True


def layerwise_variants(forward_codes: Sequence[int], backward_codes: Sequence[int]) -> Iterator[Variant]:
    """Every configuration of the kernels of layerwise levels, with dropout, which takes registers."""
    norms = (NO_NORM, BATCH_NORM, LAYER_NORM)
    yield Variant("batch_statistics", tiles.TOTALS, ())
    for dtype in DTYPES.values():
        yield Variant("norm_totals", tiles.TOTALS, (("SCALES", dtype), ("SUMS", 3)))
        yield Variant("slope_totals", tiles.SLOPES, (("SCALES", dtype),))
    for kind in VALUES:
        values, sums = tiles.VALUES[kind.aligned], tiles.SUMS[kind.aligned]
        yield _made("layer_statistics", values, kind)
        for norm in norms:
            with_dice = Settings(DICE, norm, True, tl.float32)
            for keeps in (True, False):
                yield _made("dice_rows", values, kind, LAYER=with_dice, HIDDEN=keeps)
            yield _made("dice_gradient_rows", values, kind, LAYER=with_dice)
            for code in forward_codes:
                yield _made("normalize", values, kind, LAYER=Settings(code, norm, True, tl.float32))
            for code in backward_codes:
                layer = Settings(code, norm, True, tl.float32)
                if norm != NO_NORM or has_slopes(code):  # without either there are no sums
                    yield _made("norm_sums", sums, kind, LAYER=layer)
                gradient = "layer_norm_gradient" if norm == LAYER_NORM else "preactivation_gradient"
                yield _made(gradient, values, kind, LAYER=layer)
    for kind, norm, statistics in itertools.product(PRODUCTS, norms, (True, False)):
        for code, drops in (*((code, True) for code in forward_codes), (0, False)):
            what = {"LAYER": Settings(code, norm, drops, tl.float32), "STATISTICS": statistics}
            yield _made("layerwise_product", tiles.LAYERWISE[kind.operands], kind, **what)


def pcgrad_variants() -> Iterator[Variant]:
    """Every configuration of PCGrad's kernels, for products in float64 and in float32."""
    for dtype in pcgrad.DTYPES.values():
        for group, single in dict.fromkeys((pcgrad.group_size(t), t <= pcgrad.MAX_GROUP) for t in TASKS):
            for wide in (True, False) if dtype != tl.float64 else (True,):
                between = pcgrad.columns_between(group, wide)
                constants = {"DTYPE": dtype, "WIDE": wide, "GROUP": group, "SINGLE": single, "BETWEEN": between}
                yield Variant("gram_chunks", pcgrad.GRAM, tuple(constants.items()))
        yield Variant("combine_chunks", pcgrad.COMBINE, (("DTYPE", dtype),))
    yield Variant("gram_sum", pcgrad.SUM, ())
    flags = (("CLIP", True), ("NORMALIZE", True), ("INCLUDE_SELF", False), ("MEAN", True))
    for tile in dict.fromkeys(map(pcgrad.projection_tile, TASKS)):
        yield Variant("project_tasks", tile, flags)


def snr_variants() -> Iterator[Variant]:
    """Every configuration of SNR's kernels, for up to 16 sub-networks on either side."""
    yield Variant("open_routes", Tile(1, 16, 1, 1, 1), ())
    for kind in VALUES:
        yield _made("average_sum", mixture.TILES[kind.aligned], kind)
        yield _made("route_dots", mixture.TILES[kind.aligned], kind, CLOSED_GRAD=False)
    for kind in PRODUCTS:
        for tile, transposed in itertools.product(routes.SUM[kind.operands], (False, True)):
            yield _made("route_sum", tile, kind, TRANSPOSED=transposed)
        wanted = {"NEED_WEIGHTS": True, "NEED_Z": True, "CLOSED_GRAD": True}
        yield _made("route_products", routes.PRODUCT[kind.operands], kind, **wanted)


def compile_variant(variant: Variant, architecture: int) -> Usage:
    """Compiles for an architecture (80, 90, …) and reads from the machine code what it takes."""
    kernel = next(found for m in MODULES if (found := getattr(m, variant.kernel, None)) is not None)
    try:
        found = compile_kernel(kernel, variant.tile, dict(variant.constants), architecture)
    except Exception as error:  # whatever the compiler raises is this row's result
        return Usage(error=f"{type(error).__name__}: {error}".splitlines()[0])
    instructions = sum(bool(TENSOR_CORE.fullmatch(i.name)) for i in Code(found.sass).instructions)
    wrong = faults(variant.tile, dict(variant.constants), found, architecture)
    return Usage(found.registers, found.stack, found.shared, instructions, "; ".join(wrong))


def _compile(task: tuple[Variant, int]) -> Usage:
    return compile_variant(*task)


def _with_triton(version: str) -> int:
    """Runs this program with that version of Triton in front of the installed one."""
    folder = Path("build", "triton", version).resolve()
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-m", "tests.triton.aot", *sys.argv[1:]], env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--activations", action="store_true", help="every activation, not only tanh, gelu and dice")
    parser.add_argument("--gates", action="store_true", help="every number of gates, not only the fewest and the most")
    parser.add_argument("--dtype", nargs="+", help="only kernels of these dtypes, such as bf16")
    parser.add_argument("--triton", metavar="VERSION", help="compile with this version of Triton")
    args = parser.parse_args()
    if args.triton and args.triton != triton.__version__:
        return _with_triton(args.triton)
    every = range(len(CODES))
    codes = (every, every) if args.activations else (FORWARD_CODES, BACKWARD_CODES)
    found = dict.fromkeys(
        v
        for v in every_variant(*codes, args.gates)
        if (not args.kernel or v.kernel in args.kernel) and (not args.dtype or v.dtype in args.dtype)
    )
    tasks = [(variant, each) for variant, each in itertools.product(found, args.arch) if ships(variant, each)]
    failures = 0
    print("arch  registers  stack  shared  tensor-core  kernel")
    with ProcessPoolExecutor(2) as pool:
        for (variant, architecture), usage in zip(tasks, pool.map(_compile, tasks, chunksize=4), strict=True):
            failures += bool(usage.error) and not (args.triton and usage.registers)
            figures = f"{usage.registers:>9}  {usage.stack:>5}  {usage.shared:>6}  {usage.tensor_core:>11}"
            print(f"{architecture:>4}  {figures}  {variant}  {usage.error}".rstrip(), flush=True)
    print(f"{len(tasks)} compiled for {', '.join(f'sm_{a}' for a in args.arch)}: {failures} with faults")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
