"""One training: the same batches for each variant of a seed, and the same first weights for all that share a trunk."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.demo.flights import Flights
from benchmarks.snr_study import trunks
from benchmarks.snr_study.trunks import Variant
from benchmarks.studies.model import Batch, FlightsModel, measured_aucs, minibatches
from benchmarks.studies.settings import Settings as Shared


@dataclass(frozen=True)
class Settings(Shared):
    """How much is trained.

    Args:
        route_rate: Adam's learning rate for log alpha. It has to go as far as -2.4 before a route is closed at test
            time, farther than a thousand steps of the others' rate would bring it.
    """

    route_rate: float = 5e-2


QUICK = Settings(seeds=(1, 2), epochs=1, batch=256, rows=6000, windows=5)


@dataclass
class Run:
    """What one training gave.

    Attributes:
        variant, seed: which one.
        auc: of each task, in the test period.
        loss: [windows], the mean of the summed losses, without the penalty.
        log_alpha: of each level's routes, [I][J]; none without routes.
        open: the share of routes that are open at test time; 1 without routes.
        read: for each level how many sub-networks some task's output depends on.
        parameters: those of the trunk that is served; with routes, of the compact one.
        seconds: what the training took.
    """

    variant: str
    seed: int
    auc: list[float]
    loss: list[float]
    log_alpha: list[list[list[float]]]
    open: float
    read: list[int]
    parameters: int
    seconds: float


def train(flights: Flights, data: Batch, settings: Settings, variant: Variant, seed: int) -> Run:
    """Trains one variant."""
    torch.manual_seed(seed)
    model = FlightsModel(flights, lambda features: trunks.make(variant.kind, features)).to(data.dense.device)
    trunk = model.trunk
    trunk.train(variant.sampled)  # there is nothing else in it that training changes
    alphas = [joint.log_alpha for joint in trunk.joints] if variant.routed else []
    routes = sum(alpha.numel() for alpha in alphas)
    chosen = {id(alpha) for alpha in alphas}
    groups = [{"params": [parameter for parameter in model.parameters() if id(parameter) not in chosen]}]
    optimizer = torch.optim.Adam(groups, lr=settings.learning_rate)
    if alphas:
        optimizer.add_param_group({"params": alphas, "lr": settings.route_rate})
    losses = []
    start = time.perf_counter()
    for batch in minibatches(data, flights.train, settings.epochs, settings.batch, seed):
        loss = model.losses(batch).sum()
        losses.append(loss.detach())
        if variant.weight:
            loss = loss + variant.weight / routes * trunk.l0_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    found = trunk.routes() if variant.routed else None
    return Run(
        variant=variant.name,
        seed=seed,
        auc=measured_aucs(model, data[slice(flights.train, None)]),
        loss=[part.mean().item() for part in torch.stack(losses).tensor_split(min(settings.windows, len(losses)))],
        log_alpha=[alpha.tolist() for alpha in alphas],
        open=found.num_open / routes if found else 1.0,
        read=[len(level) for level in found.read()] if found else [],
        parameters=trunks.parameters(trunk.compact() if variant.routed else trunk),
        seconds=seconds,
    )
