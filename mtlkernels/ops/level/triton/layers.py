"""What follows the product of a layerwise level's layers, as kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mtlkernels.ops._random import kept_scale, threshold
from mtlkernels.ops._triton import DTYPES, Table, Tile, launch
from mtlkernels.ops.activations import DICE
from mtlkernels.ops.level import spec
from mtlkernels.ops.level.triton import tiles
from mtlkernels.ops.level.triton.dice_kernels import dice_rows
from mtlkernels.ops.level.triton.launches import Level, Run
from mtlkernels.ops.level.triton.layerwise_kernels import normalize


class Settings(NamedTuple):
    """What a kernel is compiled for: the codes of activation and norm, dropout, and the dtype of scales and slopes."""

    activation: int
    norm: int
    drops: bool
    scales: Any
