"""Flights for the studies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks.demo.flights import Flights
from benchmarks.studies.model import Batch, FlightsModel, tensors
from benchmarks.studies.settings import Settings


@pytest.fixture(scope="module")
def flights() -> Flights:
    """400 flights that are made up, 320 of them to train, whose labels follow from their features."""
    random = np.random.default_rng(0)
    sparse = {"carrier": random.integers(0, 5, 400), "route": random.integers(0, 9, 400)}
    dense = {name: random.standard_normal(400).astype("float32") for name in ("wind", "seats")}
    late = (dense["wind"] + 0.3 * random.standard_normal(400) > 0).astype("float32")
    cancelled = (dense["wind"] + sparse["carrier"] > 2).astype("float32")
    labels = np.stack([late, np.where(cancelled == 1, np.nan, late), cancelled], axis=1).astype("float32")
    return Flights(sparse, {"carrier": 5, "route": 9}, dense, labels, 320)


@pytest.fixture
def rows(flights: Flights) -> Batch:
    return tensors(flights, torch.device("cpu"))


@pytest.fixture
def usual_training() -> Callable[[FlightsModel, Batch, Settings], list[float]]:
    """Trains a model for an epoch of 320 flights as anybody would; the means of the summed losses, a window each."""

    def train(model: FlightsModel, rows: Batch, settings: Settings) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        losses = []
        for part in torch.randperm(320, generator=torch.Generator().manual_seed(1)).split(settings.batch):
            optimizer.zero_grad()
            loss = model.losses(rows[part]).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [float(np.mean(part)) for part in np.array_split(losses, settings.windows)]

    return train
