"""What follows the products of a layerwise level, as its kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mtlkernels.ops._random import kept_scale, threshold
from mtlkernels.ops._triton import DTYPES, Launch, Run, Table, Tile, contiguous, launch
from mtlkernels.ops.activations import DICE
from mtlkernels.ops.level import spec as specs
from mtlkernels.ops.level.spec import Groups, LevelSpec
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.dice_kernels import dice_rows
from mtlkernels.ops.level.triton.launches import LevelShape
from mtlkernels.ops.level.triton.layerwise_kernels import normalize

Statistics = tuple[Tensor, Tensor]


class Settings(NamedTuple):
    """What kernels are compiled for: codes of activation and norm, whether values drop, dtype of scales and slopes."""

    activation: int
    norm: int
    drops: bool
    scales: Any


@dataclass(frozen=True)
class Layer:
    """A layer with its place in the table, where the runs of its experts start: see layerwise_functions.py."""

    number: int
    spec: specs.Layer
    settings: Settings
    place: int

    @property
    def numbers(self) -> tuple[float, float]:
        """Factor and eps, as kernels take them."""
        return kept_scale(self.spec.dropout), self.spec.eps


@dataclass(frozen=True)
class Layers:
    """What belongs to a level's layers, entered into a call's table.

    ``parameters`` are the scales, shifts and slopes as kernels read them, which may be copies; ``dtype`` is theirs.
    ``rows`` is where Dice's numbers of each row go: float32 [4, E, B] a layer that has it.
    """

    each: tuple[Layer, ...]
    parameters: tuple[list[Tensor | None], ...]
    dtype: torch.dtype
    rows: tuple[Tensor, ...]

    @staticmethod
    def of(
        table: Table,
        level: LevelShape,
        spec: LevelSpec,
        groups: Groups,
        seed: Tensor | None,
        statistics: Sequence[Statistics | None],
        stacked: Sequence[int],
    ) -> Layers:
        """``statistics`` holds means and variances of each layer, None for one without a norm.

        In these the level's experts have the numbers ``stacked``.
        """
        ready, dtype = _one_dtype((groups.scales, groups.shifts, groups.slopes))
        count = level.num_experts
        each, rows = [], []
        for i, (layer, pair) in enumerate(zip(spec.layers, statistics, strict=True)):
            place, of_rows = len(table.entries), None
            if layer.activation == DICE:
                of_rows = table.room(level.like, (4, count, level.num_rows), torch.float32)
                rows.append(of_rows)
            for e in range(count):
                for tensor in pair or (None, None):
                    table.slices(tensor, stacked[e : e + 1])
                own = [part[i * count + e] if part else None for part in ready]
                table.pointers(own)
                table.integers([0 if own[2] is None or own[2].numel() == 1 else 1])
                table.pointers(of_rows[:, e] if of_rows is not None else [None] * 4)
                table.pointers([seed])
                table.integers((spec.numbers[e], i, threshold(layer.dropout)))
            settings = Settings(layer.activation, layer.norm, layer.dropout > 0, DTYPES[dtype])
            each.append(Layer(i, layer, settings, place))
        return Layers(tuple(each), ready, dtype, tuple(rows))

    @property
    def untouched(self) -> Layer:
        """What stands in front of the first layer: inputs are read as they are."""
        return Layer(0, specs.Layer(0), Settings(0, specs.NO_NORM, False, DTYPES[self.dtype]), 0)


def _one_dtype(parameters: Sequence[Any]) -> tuple[tuple[list[Tensor | None], ...], torch.dtype]:
    """Contiguous scales, shifts and slopes of one dtype: float32 where there are several."""
    found = {part.dtype for parts in parameters for part in parts if part is not None}
    dtype = found.pop() if len(found) == 1 else torch.float32
    ready = (contiguous(None if part is None else part.to(dtype) for part in parts) for parts in parameters)
    return tuple(ready), dtype


def blocks_of(level: LevelShape, tile: Tile, width: int, depth: int = 1) -> int:
    """How many programs cover the values [E, B, width]."""
    rows = triton.cdiv(level.num_rows, tile.rows * depth)
    return level.num_experts * int(rows * triton.cdiv(width, tile.columns))


def normalized(level: LevelShape, layer: Layer, values: int, outputs: int) -> Run:
    """What a layer gives, from its pre-activations."""
    if layer.spec.activation == DICE:
        return dice(level, layer, values, outputs)
    tile = tiles.VALUES[level.kind.aligned]
    width = level.widths[layer.number + 1]
    numbers = (values, outputs, layer.place, level.num_experts, level.num_rows, width, *layer.numbers)

    def run(entries: Tensor) -> Launch | None:
        constants = {"KIND": level.kind.without_products, "LAYER": layer.settings}
        return launch(normalize, blocks_of(level, tile, width), tile, entries, *numbers, **constants)

    return run


def dice(level: LevelShape, layer: Layer, values: int, outputs: int | None) -> Run:
    """What Dice has to know of each row and, unless ``outputs`` is None, what the layer gives."""
    tile = tiles.VALUES[level.kind.aligned]
    sizes = (level.num_experts, level.num_rows, level.widths[layer.number + 1])
    numbers = (values, outputs or 0, layer.place, *sizes, *layer.numbers, layer.spec.dice_eps)
    constants = {"KIND": level.kind.without_products, "LAYER": layer.settings, "HIDDEN": outputs is not None}

    def run(entries: Tensor) -> Launch | None:
        programs = level.num_experts * triton.cdiv(level.num_rows, tile.rows)
        return launch(dice_rows, programs, tile, entries, *numbers, **constants)

    return run
