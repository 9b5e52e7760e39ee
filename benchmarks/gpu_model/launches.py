"""The launches of a call as the launchers make them: kernels, tiles, grids and arguments, recorded instead of made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.peers.fused import fused_launches
from benchmarks.peers.shape import TrunkShape
from benchmarks.peers.triton_work import Work
from mtlkernels.ops._triton import Tile
from mtlkernels.ops.activations import CODES
from mtlkernels.ops.level import triton as kernels
from mtlkernels.ops.level.call import spec_of
from mtlkernels.ops.level.spec import Groups, Layer, LevelSpec

CPU = torch.device("cpu")
ALL = Groups(*[True] * 8)


@dataclass(frozen=True)
class Launch:
    """One launch: how many programs, of which configuration; its constants and its other arguments by name."""

    kernel: Any
    programs: int
    tile: Tile
    constants: Mapping[str, Any]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Step:
    """A launch with the work that it has to do, in the forward or in the backward pass."""

    launch: Launch
    work: Work
    backward: bool


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched in the block, in its order; nothing is compiled and no kernel runs."""
    found: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | named
        of_tile = {"ROWS": "rows", "COLUMNS": "columns", "DEPTH": "depth"}
        options = {"num_warps": "warps", "num_stages": "stages", "maxnreg": "registers"}
        tile = Tile(**{field: given[name] for name, field in (of_tile | options).items() if name in given})
        flags = [p.name for p in self.params if p.is_constexpr and p.name not in of_tile]
        others = [p.name for p in self.params if not p.is_constexpr]
        constants, arguments = ({name: given[name] for name in names} for names in (flags, others))
        found.append(Launch(self, grid[0], tile, constants, arguments))

    with mock.patch.object(JITFunction, "run", note):
        yield found


def steps(shape: TrunkShape, rows: int, dtype: torch.dtype, training: bool) -> list[Step]:
    """The launches of a trunk's forward pass, or of forward and backward, as on an H100.

    Raises:
        ValueError: the launchers make other launches than the benchmarks know the work of.
    """
    levels = [_Level(shape, level, rows, dtype) for level in range(shape.num_levels)]
    with recorded() as forward:
        for level in levels:
            level.forward(training)
    with recorded() as backward:
        for level in reversed(levels) if training else ():
            level.backward()
    launches = [*forward, *backward]
    works = cast(list[Work], fused_launches(shape, rows, dtype, training, CPU))
    if [launch.name for launch in launches] != [work.kernel for work in works]:
        raise ValueError(f"expected launches of {works}, found {[launch.name for launch in launches]}")
    pairs = enumerate(zip(launches, works, strict=True))
    return [Step(launch, work, i >= len(forward)) for i, (launch, work) in pairs]


class _Level:
    """A level of a trunk, whose tensors are on the CPU, empty, and never touched."""

    def __init__(self, shape: TrunkShape, level: int, rows: int, dtype: torch.dtype) -> None:
        routing, widths = shape.routing(level), shape.widths(level)
        layers = (Layer(CODES["relu"]),) * len(shape.units)
        self.spec: LevelSpec = spec_of(routing.wiring, routing.num_inputs, layers, True)
        experts = len(self.spec.expert_inputs)

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype)

        self.inputs = [empty(rows, widths[0]) for _ in range(routing.num_inputs)]
        pairs = list(zip(widths, widths[1:], strict=False))
        weights = [empty(height, width) for width, height in pairs for _ in range(experts)]
        biases = [empty(height) for _, height in pairs for _ in range(experts)]
        gates = [empty(size, widths[0]) for size in self.spec.gate_sizes]
        self.operands = [*weights, *biases], [*gates, *(empty(size) for size in self.spec.gate_sizes)]
        self.outputs: list[Tensor] = []
        self.saved: list[Tensor] = []

    def forward(self, save: bool) -> None:
        results = kernels.forward(self.inputs, *self.operands, *self.spec.encoded, None, save)
        self.outputs, self.saved = self.spec.split_results(results)

    def backward(self) -> None:
        kernels.backward(self.outputs, self.inputs, *self.operands, self.saved, *self.spec.encoded, None, ALL)
