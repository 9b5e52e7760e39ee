"""What the launches of a normalized mixture share: where they find what follows a layer's product, and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mtlkernels.ops._random import kept_scale, threshold
from mtlkernels.ops._triton import DTYPES, Table, Tile, launch
from mtlkernels.ops.activations import DICE
from mtlkernels.ops.expert_mixture.triton_level import Level, Run
from mtlkernels.ops.normalized_mixture import triton_tiles as tiles
from mtlkernels.ops.normalized_mixture.triton_dice import dice_rows
from mtlkernels.ops.normalized_mixture.triton_kernels import normalize

Parameters = Sequence[Tensor | None]


@dataclass(frozen=True)
class Layer:
    """What follows the product of a layer; ``norm`` and ``seed`` are places in the table, see triton_functions.py."""

    number: int
    activation: int
    norm_code: int
    eps: float
    dice_eps: float
    rate: float
    norm: int
    seed: int
    scales: Any  # Triton's dtype of scales, shifts and slopes

    @property
    def dropout(self) -> tuple[int, int, float, float]:
        """Number, threshold, factor and eps, as the kernels take them."""
        return self.number, threshold(self.rate), kept_scale(self.rate), self.eps

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "SCALES": self.scales,
            "NORM": self.norm_code,
            "CODE": self.activation,
            "DROPS": self.rate > 0,
        }


@dataclass(frozen=True)
class Settings:
    """The operators' arguments that belong to the layers, entered into a call's table.

    ``parameters`` are the scales, shifts and slopes as kernels read them, which may be copies; ``dtype`` is theirs.
    ``rows`` is where Dice's numbers of each row go: float32 [4, E, B] a layer that has it.
    """

    layers: tuple[Layer, ...]
    parameters: tuple[Parameters, ...]
    dtype: torch.dtype
    rows: tuple[Tensor, ...]

    @staticmethod
    def of(
        table: Table,
        level: Level,
        activations: Sequence[int],
        norms: Sequence[int],
        eps: Sequence[float],
        dice_eps: Sequence[float],
        dropout: Sequence[float],
        seed: Tensor | None,
        parameters: Sequence[Parameters],
        statistics: Sequence[tuple[Tensor, Tensor] | None],
    ) -> Settings:
        """``statistics`` holds means and variances of each layer, None for one without a norm."""
        ready, dtype = _one_dtype(parameters)
        at_seed, count = table.pointers([seed]), level.num_experts
        layers, rows = [], []
        for i, pair in enumerate(statistics):
            own = slice(i * count, (i + 1) * count)
            mean, variance = pair or (None, None)
            norm = table.slices(mean, count)
            table.slices(variance, count)
            for part in ready:
                table.pointers(part[own])
            table.integers(0 if slope is None or slope.numel() == 1 else 1 for slope in ready[2][own])
            if activations[i] == DICE:
                rows.append(level.like.new_empty((4, count, level.num_rows), dtype=torch.float32))
                table.slices(rows[-1].flatten(0, 1), 4 * count)
            numbers = (eps[i], dice_eps[i], dropout[i])
            layers.append(Layer(i, activations[i], norms[i], *numbers, norm, at_seed, DTYPES[dtype]))
        return Settings(tuple(layers), ready, dtype, tuple(rows))


def _one_dtype(parameters: Sequence[Parameters]) -> tuple[tuple[Parameters, ...], torch.dtype]:
    """Contiguous scales, shifts and slopes of one dtype: float32 where there are several."""
    found = {part.dtype for parts in parameters for part in parts if part is not None}
    dtype = found.pop() if len(found) == 1 else torch.float32
    ready = ([None if part is None else part.to(dtype).contiguous() for part in parts] for parts in parameters)
    return tuple(ready), dtype


def statistics_of(level: Level, norms: Sequence[int]) -> list[tuple[Tensor, Tensor] | None]:
    """Room for the means and variances of each layer."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for norm, width in zip(norms, level.widths[1:], strict=True):
        shape = (level.num_experts, width if norm == 1 else level.num_rows)
        mean, variance = (level.like.new_empty(shape, dtype=torch.float32) for _ in range(2))
        found.append((mean, variance) if norm else None)
    return found


def blocks_of(level: Level, tile: Tile, width: int, depth: int = 1) -> int:
    """How many programs cover the values [E, B, width]."""
    rows = triton.cdiv(level.num_rows, tile.rows * depth)
    return level.num_experts * int(rows * triton.cdiv(width, tile.columns))


def normalized(level: Level, layer: Layer, values: int, outputs: int) -> Run:
    """What a layer gives, from its pre-activations."""
    if layer.activation == DICE:
        return dice(level, layer, values, outputs)
    tile = tiles.VALUES[level.aligned]
    width = level.widths[layer.number + 1]

    def run(entries: Tensor) -> None:
        programs = blocks_of(level, tile, width)
        sizes = (level.num_experts, level.num_rows, width)
        places = (values, outputs, layer.norm, layer.seed)
        launch(normalize, programs, tile, entries, *places, *sizes, *layer.dropout, **_constants(level, layer))

    return run


def dice(level: Level, layer: Layer, values: int, outputs: int | None) -> Run:
    """What Dice has to know of each row and, unless ``outputs`` is None, what the layer gives."""
    tile = tiles.VALUES[level.aligned]
    width = level.widths[layer.number + 1]

    def run(entries: Tensor) -> None:
        programs = level.num_experts * triton.cdiv(level.num_rows, tile.rows)
        places = (values, outputs or 0, layer.norm, layer.seed)
        numbers = (level.num_experts, level.num_rows, width, *layer.dropout, layer.dice_eps)
        constants = {**_constants(level, layer), "HIDDEN": outputs is not None}
        launch(dice_rows, programs, tile, entries, *places, *numbers, **constants)

    return run


def _constants(level: Level, layer: Layer) -> dict[str, Any]:
    return {"DTYPE": DTYPES[level.like.dtype], "ALIGNED": level.aligned, **layer.constants}
