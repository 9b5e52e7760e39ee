"""One training: the same model, weights and batches for each variant of a seed; only the updates differ."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.ablation.model import SharedModel
from benchmarks.demo.flights import TASKS, Flights
from benchmarks.harness.timing import Budget, interleaved
from benchmarks.studies.model import Batch, measured_aucs, minibatches
from benchmarks.studies.settings import Settings as Shared


class Projected:
    """PCGrad's weights, in an order that is drawn for each matrix."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0)

    def __call__(self, gram: Tensor) -> Tensor:
        self.order = torch.rand(len(gram), len(gram), generator=self.generator).argsort(dim=1)
        return self.again(gram)

    def again(self, gram: Tensor) -> Tensor:
        """Of another matrix, in the order of the last one."""
        return mk.pcgrad_weights(gram, order=self.order).sum(0)


class Aligned:
    """Aligned-MTL's weights, by TorchJD; nothing is drawn."""

    def __init__(self, seed: int) -> None:
        self.again = importlib.import_module("torchjd.aggregation").AlignedMTLWeighting()

    def __call__(self, gram: Tensor) -> Tensor:
        weights: Tensor = self.again(gram)
        return weights


METHODS: dict[str, Callable[[int], Any]] = {"PCGrad": Projected, "Aligned-MTL": Aligned}
EVERY = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Variant:
    """How the tasks' gradients of shared parameters are added up: plainly, or by a method, exact in one step of k."""

    method: str | None = None
    every: int = 1

    @property
    def name(self) -> str:
        if self.method is None:
            return "plain sum"
        return self.method if self.every == 1 else f"{self.method}, k = {self.every}"


PLAIN = Variant()
VARIANTS = (PLAIN, *(Variant(method, every) for method in METHODS for every in EVERY))


@dataclass(frozen=True)
class Settings(Shared):
    """How much is trained.

    Args:
        probe: in one step of so many, angles are measured; it has no divisor in common with k, so that all ages of
            weights come up.
    """

    seeds: Sequence[int] = (1, 2, 3)
    probe: int = 5


QUICK = Settings(seeds=(1, 2), epochs=1, batch=256, rows=6000, windows=5)
BUDGET, QUICK_BUDGET = Budget(seconds=60.0, warmup=0.1), Budget(seconds=0.1, warmup=0.001, min_rounds=1)


@dataclass
class Run:
    """What one training gave.

    Attributes:
        variant, seed: which one.
        auc: of each task, in the test period.
        loss: [windows], the mean of the summed losses.
        angles: of steps with kept weights that were measured: how many steps ago the weights were made; the angle, in
            degrees, between the update that they make and that of the weights of the step's own matrix; and the angle
            between this one and the plain sum of gradients.
        seconds: what the training took, measurements of angles included.
    """

    variant: str
    seed: int
    auc: list[float]
    loss: list[float]
    angles: list[tuple[int, float, float]]
    seconds: float


def split(model: SharedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Embeddings and trunk, whose gradients are weighted, and towers."""
    return [*model.embedding.parameters(), *model.trunk.parameters()], list(model.towers.parameters())


def angle(gram: Tensor, a: Tensor, b: Tensor) -> float:
    """In degrees, between two weighted sums of the gradients that the Gram matrix is of."""
    cosine = (a @ gram @ b) / ((a @ gram @ a) * (b @ gram @ b)).sqrt()
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))


class Trainer:
    """A model and its steps, of one variant."""

    def __init__(self, flights: Flights, settings: Settings, variant: Variant, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.model = SharedModel(flights).to(device)
        self.variant = variant
        self.shared, _ = split(self.model)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.method = METHODS[variant.method](seed) if variant.method else None
        # Those of the last Gram matrix, and how many steps ago that was made; the first step makes one.
        self.weights, self.age = torch.ones(len(TASKS), dtype=torch.float64), variant.every
        self.surgery = mk.optim.GramWeighted(
            self.adam, self._weigh, shared=self.shared, reduction="sum", gram_every=variant.every
        )

    def _weigh(self, gram: Tensor) -> Tensor:
        assert self.method is not None
        self.weights, self.age = self.method(gram), 0
        return self.weights

    def step(self, batch: Batch) -> Tensor:
        """The losses [T] before the step."""
        losses = self.model.losses(batch)
        self.adam.zero_grad()
        if self.variant.method is None:
            losses.sum().backward()
        else:
            self.age += 1
            self.surgery.backward(losses)
        self.adam.step()
        return losses.detach()

    def angles(self, batch: Batch) -> tuple[int, float, float] | None:
        """Those of the step that comes, see :class:`Run`; None where its weights are made anew."""
        if self.method is None or self.age + 1 >= self.variant.every:
            return None
        losses = self.model.losses(batch)
        grads = [torch.autograd.grad(loss, self.shared, retain_graph=True, allow_unused=True) for loss in losses]
        gram = mk.gram(grads)
        exact = self.method.again(gram)
        return self.age + 1, angle(gram, self.weights, exact), angle(gram, torch.ones_like(exact), exact)


def train(flights: Flights, data: Batch, settings: Settings, variant: Variant, seed: int) -> Run:
    """Trains one variant."""
    trainer = Trainer(flights, settings, variant, seed, data.dense.device)
    losses, angles = [], []
    start = time.perf_counter()
    for number, batch in enumerate(minibatches(data, flights.train, settings.epochs, settings.batch, seed)):
        if number % settings.probe == 0:
            angles.append(trainer.angles(batch))
        losses.append(trainer.step(batch).sum())
    seconds = time.perf_counter() - start
    windows = min(settings.windows, len(losses))
    return Run(
        variant=variant.name,
        seed=seed,
        auc=measured_aucs(trainer.model, data[slice(flights.train, None)]),
        loss=[part.mean().item() for part in torch.stack(losses).tensor_split(windows)],
        angles=[found for found in angles if found is not None],
        seconds=seconds,
    )


def step_times(flights: Flights, data: Batch, settings: Settings, budget: Budget) -> dict[str, float]:
    """Milliseconds of a step of each variant on one batch, the mean over as many as the largest k, by turns."""
    batch = data[slice(0, settings.batch)]

    def stretch(variant: Variant) -> Callable[[], None]:
        trainer = Trainer(flights, settings, variant, 1, data.dense.device)

        def run() -> None:
            for _ in range(max(EVERY)):
                trainer.step(batch)

        return run

    found = interleaved({variant.name: stretch(variant) for variant in VARIANTS}, data.dense.device, budget)
    return {name: timing.median / max(EVERY) for name, timing in found.items()}
