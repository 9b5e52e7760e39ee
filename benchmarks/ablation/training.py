"""One training: the same model, weights and batches for each variant of a seed; only the shared gradients differ."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.ablation.model import SharedModel
from benchmarks.demo.flights import TASKS, Flights
from benchmarks.studies.model import Batch, measured_aucs, minibatches
from benchmarks.studies.settings import Settings as Shared

PAIRS = tuple(itertools.combinations(range(len(TASKS)), 2))


@dataclass(frozen=True)
class Variant:
    """What is done to the tasks' gradients of shared parameters before they are added up."""

    name: str
    project: bool = False
    clip: bool = False
    normalize: bool = False


VARIANTS = (
    Variant("plain sum"),
    Variant("clip", clip=True),
    Variant("normalise", normalize=True),
    Variant("project", project=True),
    Variant("project + clip", project=True, clip=True),
    Variant("project + normalise", project=True, normalize=True),
)
PLAIN = VARIANTS[0]


@dataclass(frozen=True)
class Settings(Shared):
    """How much is trained.

    Args:
        norm_steps: ``max_norm`` is the median of the tasks' gradient norms in so many first steps of the seed's plain
            sum, so that clipping acts on about half of what is seen there, and more on the tasks with long gradients.
    """

    norm_steps: int = 50


QUICK = Settings(seeds=(1, 2), epochs=1, batch=256, rows=6000, norm_steps=5, windows=5)


@dataclass
class Run:
    """What one training gave.

    Attributes:
        variant, seed: which one.
        auc: of each task, in the test period.
        conflicts: [windows][pairs], the share of steps in which the pair's gradients had a negative inner product.
        cosines: [windows][pairs], the mean cosine of the angle between them.
        norms: [windows][T], the median norm of each task's gradient.
        clipped: [T], the share of steps in which the task's gradient was longer than ``max_norm``.
        max_norm: where it was clipped.
        loss: [windows], the mean of the summed losses.
        seconds: what the training took.
    """

    variant: str
    seed: int
    auc: list[float]
    conflicts: list[list[float]]
    cosines: list[list[float]]
    norms: list[list[float]]
    clipped: list[float]
    max_norm: float
    loss: list[float]
    seconds: float


def train(
    flights: Flights, data: Batch, settings: Settings, variant: Variant, seed: int, max_norm: float | None
) -> Run:
    """Trains one variant. Without ``max_norm``, that is for the plain sum, it is found here."""
    torch.manual_seed(seed)
    model = SharedModel(flights).to(data.dense.device)
    shared, heads = model.shared(), model.heads()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    options: dict[str, Any] = {"project": variant.project, "normalize": variant.normalize}
    if variant.clip:
        options["max_norm"] = max_norm
    if variant.project:
        options["generator"] = torch.Generator().manual_seed(seed)
    losses, grams = [], []
    start = time.perf_counter()
    for batch in minibatches(data, flights.train, settings.epochs, settings.batch, seed):
        of_tasks = model.losses(batch)
        gradients = _gradients(of_tasks, [*shared, *heads])
        mine = [task[: len(shared)] for task in gradients]
        grams.append(mk.gram(mine))
        losses.append(of_tasks.detach().sum())
        for parameter, update in zip(shared, mk.pcgrad(mine, **options), strict=True):
            parameter.grad = update
        for parameter, *parts in zip(heads, *(task[len(shared) :] for task in gradients), strict=True):
            parameter.grad = torch.stack([part for part in parts if part is not None]).sum(0)
        optimizer.step()
    seconds = time.perf_counter() - start
    windows = min(settings.windows, len(losses))
    gram = torch.stack(grams)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    if max_norm is None:
        max_norm = float(norms[: settings.norm_steps].median())
    cosines = torch.stack([gram[:, i, j] / (norms[:, i] * norms[:, j]) for i, j in PAIRS], dim=1)
    conflicting = (cosines < 0).double()
    return Run(
        variant=variant.name,
        seed=seed,
        auc=measured_aucs(model, data[slice(flights.train, None)]),
        conflicts=[part.mean(0).tolist() for part in conflicting.tensor_split(windows)],
        cosines=[part.mean(0).tolist() for part in cosines.tensor_split(windows)],
        norms=[part.median(0).values.tolist() for part in norms.tensor_split(windows)],
        clipped=(norms > max_norm).double().mean(0).tolist(),
        max_norm=max_norm,
        loss=[part.mean().item() for part in torch.stack(losses).tensor_split(windows)],
        seconds=seconds,
    )


def _gradients(losses: Tensor, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Of each task's loss, by a backward pass each; None where it does not reach a parameter."""
    last = len(losses) - 1
    return [
        list(torch.autograd.grad(loss, parameters, retain_graph=t < last, allow_unused=True))
        for t, loss in enumerate(losses)
    ]
