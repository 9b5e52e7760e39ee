"""A small multi-task model on the flights of the demo: embeddings, a trunk to choose, a tower and a loss a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo.flights import TASKS, Flights
from benchmarks.demo.model import aucs

EMBEDDING, TOWER = 8, 16


@dataclass(frozen=True)
class Batch:
    """Codes [B, S] of the sparse features, one table for all of them; dense features [B, D]; labels [B, T]."""

    codes: Tensor
    dense: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        return Batch(self.codes[rows], self.dense[rows], self.labels[rows])


def tensors(flights: Flights, device: torch.device) -> Batch:
    """All flights, the training period first."""
    starts = np.cumsum([0, *flights.vocabulary.values()])
    codes = np.stack([codes + start for codes, start in zip(flights.sparse.values(), starts, strict=False)], axis=1)
    dense = np.stack(list(flights.dense.values()), axis=1)
    return Batch(*(torch.from_numpy(part).to(device) for part in (codes, dense, flights.labels)))


def features(flights: Flights) -> int:
    """How many a trunk reads."""
    return EMBEDDING * len(flights.sparse) + len(flights.dense)


class FlightsModel(nn.Module):
    """Embeddings, a trunk that gives each task a tensor, and a tower a task.

    Args:
        flights: what the embeddings are for.
        make_trunk: the trunk for a number of features; it has ``out_features``.
    """

    trunk: Any

    def __init__(self, flights: Flights, make_trunk: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(flights.vocabulary.values()), EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.trunk = make_trunk(features(flights))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(self.trunk.out_features, TOWER), nn.ReLU(), nn.Linear(TOWER, 1)) for _ in TASKS
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, T]."""
        x = torch.cat([self.embedding(batch.codes).flatten(1), batch.dense], dim=1)
        return torch.cat([tower(y) for tower, y in zip(self.towers, self.trunk(x), strict=True)], dim=1)

    def losses(self, batch: Batch) -> Tensor:
        """The mean binary cross-entropy of each task over the flights that have its label: [T]."""
        known = ~batch.labels.isnan()
        entropy = F.binary_cross_entropy_with_logits(
            self(batch), batch.labels.nan_to_num(), weight=known.float(), reduction="none"
        )
        return entropy.sum(0) / known.sum(0).clamp(min=1)


def minibatches(data: Batch, train: int, epochs: int, rows: int, seed: int) -> Iterator[Batch]:
    """The training period in an order that depends on the seed alone, anew in each epoch."""
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(train, generator=shuffle).split(rows):
            yield data[chosen.to(data.dense.device)]


@torch.no_grad()
def measured_aucs(model: FlightsModel, data: Batch) -> list[float]:
    """Each task's, of the model in evaluation mode."""
    model.eval()
    rows = torch.arange(len(data), device=data.dense.device)
    logits = torch.cat([model(data[part]) for part in rows.split(8192)])
    return aucs(logits.cpu(), data.labels.cpu())
