"""The model whose shared gradients the ablation works on: an MMoE."""

from __future__ import annotations

from torch import nn

import mtlkernels as mk
from benchmarks.demo.flights import TASKS, Flights
from benchmarks.studies.model import FlightsModel

EXPERTS, UNITS = 6, (64, 32)


class SharedModel(FlightsModel):
    """Embeddings and experts, which all tasks share, and a gate and a tower a task, which are its own."""

    def __init__(self, flights: Flights) -> None:
        super().__init__(flights, lambda width: mk.nn.MMoE(width, len(TASKS), UNITS, EXPERTS))

    def shared(self) -> list[nn.Parameter]:
        """The parameters that every task's loss reaches."""
        return [*self.embedding.parameters(), *self.trunk.level.experts.parameters()]

    def heads(self) -> list[nn.Parameter]:
        """The others."""
        shared = {id(parameter) for parameter in self.shared()}
        return [parameter for parameter in self.parameters() if id(parameter) not in shared]
