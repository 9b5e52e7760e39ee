"""A whole multi-task model, a trunk with a tower a task, and what a training step of it under PCGrad takes at least."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.work import Work
from benchmarks.peers.exact import rows_at_a_corner
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import TrunkShape

TOWER_WIDTH = 64
TOWER_BIAS = 0.5
# The share of positive labels, of one task and of the next in turn.
POSITIVE = (0.8, 0.2)
# Rows drawn beside those that are wanted, as a share of them and a number: some have an input of a ReLU at its corner.
SPARE_SHARE, SPARE_ROWS = 0.25, 16
_GATE = re.compile(r"gate \d+")


class StepModel(nn.Module):
    """A trunk and, behind each task's gate, a tower of two linear layers that ends in a logit.

    All towers start as copies of one. Tasks whose labels are mostly positive and tasks whose labels are mostly negative
    then pull what they share in opposite directions: about half of the pairs conflict, and by clear angles.

    Biases keep a tower's ReLUs off their corners. Its few units see nearly the same in each row, so that in bfloat16
    rounding would turn some over for the whole batch in one implementation and not in another.
    """

    def __init__(self, trunk: PerExpertTrunk, shape: TrunkShape) -> None:
        super().__init__()
        self.trunk = trunk
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(shape.units[-1], TOWER_WIDTH), nn.ReLU(inplace=True), nn.Linear(TOWER_WIDTH, 1))
            for _ in range(shape.num_tasks)
        )
        with torch.no_grad():
            bias = self.before_relu()[-1].bias
            bias.add_(TOWER_BIAS * bias.sign())
        for tower in self.towers[:-1]:
            tower.load_state_dict(self.towers[-1].state_dict())

    def forward(self, x: Tensor) -> list[Tensor]:
        """A logit [B] a task."""
        return self.logits(self.trunk(x))

    def logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """From the trunk's outputs."""
        return [tower(h).squeeze(1) for tower, h in zip(self.towers, features, strict=True)]

    def losses(self, features: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
        """The mean cross-entropy of each task, from the trunk's outputs and labels [T, B]."""
        pairs = zip(self.logits(features), labels, strict=True)
        return [F.binary_cross_entropy_with_logits(logit, label) for logit, label in pairs]

    def before_relu(self) -> list[nn.Linear]:
        """The linear layers whose outputs go into a ReLU."""
        towers = [tower[0] for tower in self.towers if isinstance(tower, nn.Sequential)]
        return [*self.trunk.before_relu(), *(linear for linear in towers if isinstance(linear, nn.Linear))]

    def gradients(self) -> dict[str, Tensor]:
        """Parameters' gradients under the names that all contenders share.

        The gates' weights of a level are one tensor, and so are their biases: one gate has four of them or a few more,
        and what bfloat16 makes of so few is a matter of luck. A tower's parameters are one tensor as well.
        """
        parts: dict[str, list[Tensor]] = {}
        for name, grad in self.trunk.gradients().items():
            parts.setdefault(_GATE.sub("gates", name), []).append(grad.flatten())
        for task, tower in enumerate(self.towers):
            parts[f"gradients: tower {task}"] = [_grad(p).flatten() for p in tower.parameters()]
        return {name: torch.cat(grads) for name, grads in parts.items()}


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(f"a parameter of shape {list(parameter.shape)} got no gradient")
    return parameter.grad


def draw(model: StepModel, shape: TrunkShape, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, D] inputs in none of whose rows a ReLU is at its corner but for rounding.

    Raises:
        ValueError: too many rows of the draw have one.
    """
    drawn = torch.randn(rows + int(SPARE_SHARE * rows) + SPARE_ROWS, shape.in_features).to(dtype).to(device)
    clear = drawn[~rows_at_a_corner(model, drawn)]
    if len(clear) < rows:
        raise ValueError(f"{rows} rows without an input of a ReLU near zero are wanted, got {len(clear)}")
    return clear[:rows].clone()


def draw_labels(shape: TrunkShape, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, B] of 0 and 1."""
    shares = [POSITIVE[task % len(POSITIVE)] for task in range(shape.num_tasks)]
    return torch.stack([torch.rand(rows) < share for share in shares]).to(dtype).to(device)


def reached(shape: TrunkShape, task: int) -> list[tuple[set[int], set[int]]]:
    """Level by level, the experts and the gates on which a task's loss depends."""
    gates = {task}
    levels: list[tuple[set[int], set[int]]] = []
    for level in reversed(range(shape.num_levels)):
        routing = shape.routing(level)
        experts = {expert for gate in gates for expert in routing.gate_experts[gate]}
        levels.insert(0, (experts, gates))
        gates = gates | {routing.expert_inputs[expert] for expert in experts}  # gates read the stream of their number
    return levels


def step_work(shape: TrunkShape, rows: int, itemsize: int) -> Work:
    """One forward pass, for each task a backward pass of what its loss reaches, the projection, and Adam.

    Of the arithmetic, only that of linear layers is counted. The input needs no gradient. Of the traffic, that of
    weights and their gradients: read for the forward pass; a gradient a task written, and read twice to be projected;
    the update written; weight, update and two moments read, and weight and moments written by Adam. The input is read.
    """
    tower = shape.units[-1] * TOWER_WIDTH + TOWER_WIDTH
    tower_parameters = tower + TOWER_WIDTH + 1
    weights, biases = shape.parameters()
    products = weights + shape.num_tasks * 3 * tower
    gradients = 0
    for task in range(shape.num_tasks):
        for level, (experts, gates) in enumerate(reached(shape, task)):
            widths = shape.widths(level)
            layers = [a * b for a, b in zip(widths, widths[1:], strict=False)]
            logits = sum(len(shape.routing(level).gate_experts[gate]) for gate in gates)
            products += 2 * len(experts) * sum(layers) + 2 * widths[0] * logits
            if level == 0:
                products -= len(experts) * layers[0] + widths[0] * logits
            gradients += len(experts) * (sum(layers) + sum(shape.units)) + (widths[0] + 1) * logits
    parameters = weights + biases + shape.num_tasks * tower_parameters
    moved = parameters + 3 * gradients + parameters + 7 * parameters + rows * shape.in_features
    return Work(flop=2.0 * rows * products, traffic=float(moved * itemsize))
