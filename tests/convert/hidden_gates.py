"""Levels of which no call is kept as a whole, and what was read of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mtlkernels as mk
from mtlkernels._convert.calls import CALLS
from tests.convert.changes import Level, serve

ROWS = 1100  # with which every level is fused in every mode


class HiddenGates(Level):
    """Its gates are more than linear layers."""

    hidden = True


def converted() -> Any:
    model = HiddenGates().eval()
    assert mk.convert(model).replaced
    return model


def kept() -> Any:
    """A level that has served until what is read of it is kept."""
    model = converted()
    for _ in range(4):
        serve(model, torch.ones(3, 20))
    assert len(readings(model)) == 1
    return model


def readings(model: nn.Module) -> list[Any]:
    calls = vars(model).get(CALLS)
    places = [] if calls is None else list(calls.readings(0)._places.values())
    return [place.kept for place in places if place.kept is not None]
