"""A small MMoE on the flights of the demo, with one loss a task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.demo.flights import TASKS, Flights

EMBEDDING = 8
EXPERTS, UNITS, TOWER = 6, (64, 32), 16


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


class FlightsModel(nn.Module):
    """Embeddings and experts, which all tasks share, and a gate and a tower a task, which are its own."""

    def __init__(self, flights: Flights) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(flights.vocabulary.values()), EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=0.05)
        width = EMBEDDING * len(flights.sparse) + len(flights.dense)
        self.trunk = mk.nn.MMoE(width, len(TASKS), UNITS, EXPERTS)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(UNITS[-1], TOWER), nn.ReLU(), nn.Linear(TOWER, 1)) for _ in TASKS
        )

    def shared(self) -> list[nn.Parameter]:
        """The parameters that every task's loss reaches."""
        return [*self.embedding.parameters(), *self.trunk.level.experts.parameters()]

    def heads(self) -> list[nn.Parameter]:
        """The others."""
        shared = {id(parameter) for parameter in self.shared()}
        return [parameter for parameter in self.parameters() if id(parameter) not in shared]

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
