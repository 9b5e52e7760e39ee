"""A model of torch-rechub, and data made by chance for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import PLE

SPARSE, VOCABULARY, EMBEDDING, DENSE = 10, 1000, 40, 16  # 10 x 40 + 16 = 416 features enter the first level
TASKS = ("click", "conversion")


def click_data(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, 10], numbers [N, 16] and labels [N, 2] made by chance: who clicked, and who then bought something."""
    generator = torch.Generator().manual_seed(seed)
    taste = torch.randn(SPARSE, VOCABULARY, len(TASKS), generator=generator)
    slope = torch.randn(DENSE, len(TASKS), generator=generator)
    codes = torch.randint(VOCABULARY, (rows, SPARSE), generator=generator)
    numbers = torch.randn(rows, DENSE, generator=generator)
    score = taste[torch.arange(SPARSE), codes].mean(1) * 3 + numbers @ slope / 4
    chance = torch.rand(rows, len(TASKS), generator=generator) < score.sigmoid()
    return codes, numbers, chance.cumprod(1).float()


def by_name(codes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """The features as torch-rechub's models take them."""
    sparse = {f"code{i}": column for i, column in enumerate(codes.unbind(1))}
    return sparse | {f"number{i}": column for i, column in enumerate(numbers.unbind(1))}


def rechub_ple(seed: int = 0) -> PLE:
    """torch-rechub's PLE: two levels of 4 experts a task and 4 shared ones, 416 → 256 → 128; a seed, one model."""
    torch.manual_seed(seed)
    features = [SparseFeature(f"code{i}", VOCABULARY, embed_dim=EMBEDDING) for i in range(SPARSE)]
    features += [DenseFeature(f"number{i}") for i in range(DENSE)]
    experts, towers = {"dims": [256, 128]}, [{"dims": [64]}] * len(TASKS)
    return PLE(features, ["classification"] * len(TASKS), 2, 4, 4, experts, towers)
