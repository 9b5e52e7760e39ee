"""The demo's part on PCGrad: deepctr-torch's PLE under the usual one, and converted under ``mk.optim.PCGrad``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.demo import model as ple
from benchmarks.demo.flights import TASKS, Flights
from benchmarks.demo.plot import draw_surgery
from benchmarks.demo.progress import Progress
from benchmarks.demo.tables import place, print_losses, print_times, speedups, tenths
from benchmarks.demo.times import in_turns
from benchmarks.peers.usual_pcgrad import usual_backward
from mtlkernels.ops.pcgrad import draw_order

NAMES = USUAL, OURS = "usual", "mk.optim"
BETWEEN = f"{OURS} from {USUAL}, both in float32"
PAIRS = tuple(itertools.combinations(range(len(TASKS)), 2))
BATCH = 256  # rows of a training batch: more steps in the same time, and more conflicts in them, than with larger ones
SMALL = 64  # rows of the small batch that is timed
HEADS = ("tower_dnn", "out.")  # what deepctr-torch calls towers


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What the tasks share, which is embeddings, experts and gates, and their towers."""
    shared, towers = [], []
    for name, parameter in model.named_parameters():
        (towers if name.startswith(HEADS) else shared).append(parameter)
    return shared, towers


class Surgery:
    """A training under PCGrad. The order of projections depends on nothing but the seed.

    Args:
        model: what is trained.
        name: one of :data:`NAMES`; :data:`OURS` converts the model and uses ``mtlkernels.optim.PCGrad``.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(ple.SEED)
        self.shared, self.towers = parts(model)
        self.optimizer: torch.optim.Optimizer = ple.adam(model)
        self.backward: Callable[[Tensor], Tensor | None] = self._usual
        if name == OURS:
            mk.convert(model)
            self.optimizer = mk.optim.PCGrad(
                self.optimizer, shared=self.shared, reduction="sum", generator=self.generator
            )
            self.backward = self.optimizer.pc_backward
        model.train()

    def _usual(self, losses: Tensor) -> None:
        order = draw_order(None, self.generator, len(losses), losses.device, True)
        assert order is not None
        usual_backward(losses.unbind(), self.shared, self.towers, order.tolist())

    def differentiate(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Fills ``.grad``; the tasks' losses, and the Gram matrix where there is one."""
        losses = ple.task_losses(self.model, features, labels)
        self.optimizer.zero_grad()
        gram = self.backward(losses)
        return losses.detach(), gram

    def step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`differentiate`, the penalty's gradient beside it, which is no task's, and Adam."""
        found = self.differentiate(features, labels)
        penalty = ple.penalty(self.model)
        if penalty is not None:
            penalty.backward()
        self.optimizer.step()
        return found

    def update(self, features: Tensor, labels: Tensor) -> Tensor:
        """[P]: what PCGrad makes of the tasks' gradients of all shared parameters."""
        self.differentiate(features, labels)
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.shared])


def distances(model: Any, features: Tensor, labels: Tensor) -> dict[str, float]:
    """What from what in the first update -> the largest difference, as a share of the largest entry."""
    updates = {
        (name, dtype): Surgery(copy.deepcopy(model).to(dtype), name).update(features.to(dtype), labels.to(dtype))
        for name in NAMES
        for dtype in (torch.float32, torch.float64)
    }
    exact = updates[USUAL, torch.float64]

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).abs().max() / exact.abs().max())

    usual, ours = updates[USUAL, torch.float32], updates[OURS, torch.float32]
    return {
        f"{USUAL} in float32 from {USUAL} in float64": distance(usual, exact),
        f"{OURS} in float32 from {USUAL} in float64": distance(ours, exact),
        BETWEEN: distance(ours, usual),
        f"{OURS} from {USUAL}, both in float64": distance(updates[OURS, torch.float64], exact),
    }


def print_conflicts(conflicts: Mapping[str, Sequence[bool]]) -> None:
    print("\nSteps in which the gradients of two tasks conflict (their inner product is negative)")
    print(f"  {'steps':>11}" + "".join(f"  {pair}" for pair in conflicts))
    steps = len(next(iter(conflicts.values())))
    for start, end in [*tenths(steps), (0, steps)]:
        shares = {pair: 100 * sum(found[start:end]) / (end - start) for pair, found in conflicts.items()}
        cells = "".join(f"  {f'{share:.0f}%':>{len(pair)}}" for pair, share in shares.items())
        print(f"  {f'{start + 1}-{end}':>11}{cells}")


def train(
    model: Any, features: Tensor, labels: Tensor, order: Sequence[Tensor]
) -> tuple[dict[str, Surgery], dict[str, list[float]], dict[str, list[bool]]]:
    """Trains copies of the model both ways, over the flights of each batch.

    Returns:
        The trainings; the sum of the tasks' losses in each step of each; for each pair of tasks, whether they conflict
        in each step of the converted one's.
    """
    trainings, losses, grams = {}, {}, []
    for name in NAMES:
        surgery = trainings[name] = Surgery(copy.deepcopy(model), name)

        def step(features: Tensor, labels: Tensor, surgery: Surgery = surgery) -> Tensor:
            of_tasks, gram = surgery.step(features, labels)
            if gram is not None:
                grams.append(gram)
            return of_tasks.sum()

        losses[name] = ple.train(step, features, labels, order, Progress(name, len(order)))
    negative = torch.stack(grams) < 0
    return trainings, losses, {f"{TASKS[i]} / {TASKS[j]}": negative[:, i, j].tolist() for i, j in PAIRS}


def run(flights: Flights, steps: int, batch: int, seconds: float, out: Path) -> str:
    """Trains and times the model both ways; what came out, in short.

    Args:
        flights: the data.
        steps: of each training.
        batch: rows of the larger batch that is timed.
        seconds: for each row of timings.
        out: the folder for the plot.
    """
    model = ple.DEEPCTR.build(flights)
    features, labels = (tensor[: flights.train] for tensor in ple.tensors(model, flights))
    order = list(itertools.islice(ple.batches(flights.train, steps, BATCH), steps))
    shared, towers = (sum(p.numel() for p in part) for part in parts(model))
    print(
        f"\n=== {ple.DEEPCTR.label} under PCGrad, which projects conflicting gradients onto each other's normal planes"
    )
    print(f"\n  {USUAL:<10}the model as it is; a backward pass for each loss, and a loop over pairs of flat gradients")
    print(f"  {OURS:<10}the model after mtlkernels.convert, under mtlkernels.optim.PCGrad")
    print(f"\nThe gradients of the {shared:,} parameters of embeddings, experts and gates are projected. Those of the")
    print(
        f"{towers:,} parameters of towers, and of the embeddings' L2 penalty, which belongs to no task, are only added."
    )

    print("\nThe first update: largest difference, as a share of the update's largest entry")
    found = distances(model, features[order[0]], labels[order[0]])
    for what, distance in found.items():
        print(f"  {what:<46}  {distance:.1e}")
    print("  (In float32, rounding may decide on which side of zero the input of a ReLU falls, which changes gradients")
    print("  by more than rounding. Where it decides whether two gradients conflict, the update hardly changes.)")

    print(f"\nTraining: {len(order)} steps, batch size {BATCH}; the same weights, batches and order of projections")
    trainings, losses, conflicts = train(model, features, labels, order)
    print_losses(NAMES, losses[USUAL], losses[OURS])
    print_conflicts(conflicts)
    for surgery in trainings.values():
        for group in surgery.optimizer.param_groups:
            group["lr"] = ple.TIMED_RATE
    steps_of = {name: surgery.step for name, surgery in trainings.items()}
    print("\nTiming both in turns ...")
    times = in_turns(steps_of, (features, labels), sorted({SMALL, batch}), seconds)
    print_times(NAMES, "Time of a training step under PCGrad (forward, backward, Adam", times)
    path = out / "demo-pcgrad.png"
    draw_surgery(path, ple.DEEPCTR.label, (losses[USUAL], losses[OURS]), conflicts, place())

    faster = " and ".join(f"{factor:.2f} times ({size:,} rows)" for size, factor in speedups(NAMES, times).items())
    shares = "; ".join(f"{pair} in {100 * sum(found) / len(found):.0f}%" for pair, found in conflicts.items())
    return (
        f"A training step of {ple.DEEPCTR.label} under PCGrad is {faster} as fast\nwith mtlkernels.optim.PCGrad as with"
        f" the usual one; the first updates differ by {found[BETWEEN]:.0e} of the largest entry.\nGradients conflict:"
        f" {shares} of the steps. The plot is {path}."
    )
