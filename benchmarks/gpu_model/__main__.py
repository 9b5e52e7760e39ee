"""What a level's launches would take on a GPU, modelled from their compiled code: ``python -m benchmarks.gpu_model``.

Needs no GPU. The launches are those that the launchers make; each is compiled, and its machine code read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_model.card import CARDS, Card
from benchmarks.gpu_model.cubin import Cubin, compile_kernel
from benchmarks.gpu_model.launches import Launch, Step, steps
from benchmarks.gpu_model.model import predict
from benchmarks.gpu_model.table import Pass, as_json, markdown
from benchmarks.peers.shape import TrunkShape
from benchmarks.suites.mixture import LEVEL, TWO_LEVELS

WORKLOADS = {"A": LEVEL, "A2": TWO_LEVELS}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="A model of a level's launches on a GPU, from their compiled code.")
    p.add_argument("--arch", type=int, choices=CARDS, default=90, help="the card's compute capability, times ten")
    p.add_argument("--workload", choices=WORKLOADS, default="A", help="of the mixture suite")
    p.add_argument("--rows", type=int, nargs="+", default=[4096, 65536], metavar="N")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--json", type=Path, metavar="FILE", help="write it")
    return p


def compiler(architecture: int) -> Callable[[Launch], Cubin]:
    """Compiles launches, each configuration once."""
    found: dict[tuple[object, ...], Cubin] = {}

    def compiled(launch: Launch) -> Cubin:
        key = (launch.name, launch.tile, *map(str, launch.constants.items()))
        if key not in found:
            found[key] = compile_kernel(launch.kernel, launch.tile, launch.constants, architecture)
        return found[key]

    return compiled


def passes(
    shape: TrunkShape, rows: int, dtype: torch.dtype, card: Card, compiled: Callable[[Launch], Cubin]
) -> list[Pass]:
    """Serving, which saves nothing; then forward and backward of a training step."""

    def predicted(name: str, made: list[Step]) -> Pass:
        return Pass(name, rows, [predict(step, compiled(step.launch), card) for step in made])

    training = steps(shape, rows, dtype, True)
    return [
        predicted("forward", steps(shape, rows, dtype, False)),
        predicted("forward in training", [step for step in training if not step.backward]),
        predicted("backward", [step for step in training if step.backward]),
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    card, dtype, compiled = CARDS[options.arch], DTYPES[options.dtype], compiler(options.arch)
    found = [each for rows in options.rows for each in passes(WORKLOADS[options.workload], rows, dtype, card, compiled)]
    print(markdown(found, card))
    if options.json:
        options.json.write_text(json.dumps(as_json(found, card), indent=1) + "\n")
        print(f"\nwrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
