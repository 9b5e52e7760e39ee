"""The sizes of a multi-task trunk, and what one evaluation of it costs at least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mtlkernels as mk
from benchmarks.harness.work import Work, by_row


@dataclass(frozen=True)
class TrunkShape:
    """One level of experts and gates (CGC), or several (PLE: Tang et al., RecSys 2020).

    Every level but the last has a shared gate, whose output the next level's shared experts read. ``last_shared_gate``
    gives the last level one too, as a level has that is measured on its own. Experts follow each layer by a ReLU; gates
    are one linear layer with bias.
    """

    in_features: int
    num_tasks: int
    num_specific: int
    num_shared: int
    units: tuple[int, ...]
    num_levels: int = 1
    last_shared_gate: bool = False

    @property
    def num_experts(self) -> int:
        return self.num_tasks * self.num_specific + self.num_shared

    def routing(self, level: int) -> mk.Routing:
        """Who reads what: at the first level everybody reads the one input."""
        return mk.Routing.cgc(
            self.num_tasks,
            self.num_specific,
            self.num_shared,
            shared_gate=self.last_shared_gate or level < self.num_levels - 1,
            single_input=level == 0,
        )

    def widths(self, level: int) -> tuple[int, ...]:
        """Features in front of each layer of the level's experts, and behind the last."""
        return (self.in_features if level == 0 else self.units[-1], *self.units)

    def gate_width(self, level: int) -> int:
        """Logits of all gates of a level."""
        return sum(len(gate) for gate in self.routing(level).gate_experts)

    def parameters(self) -> tuple[int, int]:
        """Numbers of weights and of biases."""
        weights = biases = 0
        for level in range(self.num_levels):
            widths, logits = self.widths(level), self.gate_width(level)
            weights += self.num_experts * sum(a * b for a, b in zip(widths, widths[1:], strict=False))
            weights += widths[0] * logits
            biases += self.num_experts * sum(self.units) + logits
        return weights, biases

    def work(self, rows: int, itemsize: int, training: bool) -> Work:
        """Experts' and gates' linear layers; mixing is not counted. Parameters, input and outputs have to move."""
        weights, biases = self.parameters()
        outputs = self.routing(self.num_levels - 1).num_gates * self.units[-1]
        return by_row(rows, weights, weights + biases, self.in_features + outputs, itemsize, training)


# Workloads A and A2.
LEVEL = TrunkShape(416, num_tasks=2, num_specific=4, num_shared=4, units=(256, 128), last_shared_gate=True)
TWO_LEVELS = replace(LEVEL, num_levels=2, last_shared_gate=False)
