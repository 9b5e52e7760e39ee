"""The states of the generators that a forward pass may draw from: PyTorch's default one, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


def seed() -> Any:
    """Sets the generators that a forward may draw from; the state that they have then."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(0)
    return random_state()


def random_state() -> Any:
    """Of PyTorch's default generator, Python's and NumPy's, to be compared."""
    numpy = sys.modules.get("numpy")
    of_numpy = None
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        of_numpy = (kind, keys.tobytes(), *rest)
    return bytes(torch.get_rng_state().tolist()), random.getstate(), of_numpy


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """The user's generators are afterwards as they were."""
    numpy = sys.modules.get("numpy")
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
