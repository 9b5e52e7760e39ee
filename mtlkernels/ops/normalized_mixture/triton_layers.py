"""What the launches of a normalized mixture share: where a layer's norm and dropout are found, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mtlkernels.ops._random import kept_scale, threshold
from mtlkernels.ops._triton import DTYPES, Table, Tile, launch
from mtlkernels.ops.expert_mixture.triton_level import Level, Run
from mtlkernels.ops.normalized_mixture import triton_tiles as tiles
from mtlkernels.ops.normalized_mixture.triton_kernels import normalize

Parameters = Sequence[Tensor | None]


@dataclass(frozen=True)
class Layer:
    """What follows the product of a layer; ``norm`` and ``seed`` are places in the table."""

    number: int
    activation: int
    norm_code: int
    eps: float
    rate: float
    norm: int
    seed: int
    scales: Any  # Triton's dtype of scales and shifts

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

    ``parameters`` are the scales and shifts as kernels read them, which may be copies.
    """

    layers: tuple[Layer, ...]
    parameters: tuple[Parameters, Parameters]

    @staticmethod
    def of(
        table: Table,
        num_experts: int,
        activations: Sequence[int],
        norms: Sequence[int],
        eps: Sequence[float],
        dropout: Sequence[float],
        seed: Tensor | None,
        scales: Parameters,
        shifts: Parameters,
        statistics: Sequence[tuple[Tensor, Tensor] | None],
    ) -> Settings:
        """``statistics`` holds means and variances of each layer, None for one without a norm."""
        scales, shifts, dtype = _one_dtype(scales, shifts)
        at_seed = table.pointers([seed])
        layers = []
        for i, pair in enumerate(statistics):
            own = slice(i * num_experts, (i + 1) * num_experts)
            mean, variance = pair or (None, None)
            norm = table.slices(mean, num_experts)
            table.slices(variance, num_experts)
            table.pointers(scales[own])
            table.pointers(shifts[own])
            layers.append(Layer(i, activations[i], norms[i], eps[i], dropout[i], norm, at_seed, dtype))
        return Settings(tuple(layers), (scales, shifts))


def _one_dtype(scales: Parameters, shifts: Parameters) -> tuple[Parameters, Parameters, Any]:
    """Contiguous scales and shifts of one dtype: float32 where there are several."""
    found = {part.dtype for part in (*scales, *shifts) if part is not None}
    dtype = found.pop() if len(found) == 1 else torch.float32
    ready = [[None if part is None else part.to(dtype).contiguous() for part in parts] for parts in (scales, shifts)]
    return ready[0], ready[1], DTYPES[dtype]


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
    tile = tiles.VALUES[level.aligned]
    width = level.widths[layer.number + 1]

    def run(entries: Tensor) -> None:
        launch(
            normalize,
            blocks_of(level, tile, width),
            tile,
            entries,
            values,
            outputs,
            layer.norm,
            layer.seed,
            level.num_experts,
            level.num_rows,
            width,
            *layer.dropout,
            DTYPE=DTYPES[level.like.dtype],
            ALIGNED=level.aligned,
            **layer.constants,
        )

    return run
