"""Calls that serve by their caller's own lists of parameters, kept from one to the next: see ``csrc/kept_lists.cpp``.

What is kept is where tensors lie and the tables for the kernels, as of trunks' levels in ``kept.py``; each call
compares the lists with it, and values are read where they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from mtlkernels import _backends, _dumps, _extension, _torch
from mtlkernels.routing import Routing


@functools.cache
def kept_lists() -> Any:
    """All that is kept, of a bounded number of levels. ``_C`` has to be there."""
    return _extension.function("KeptLists")(vars(_backends), vars(_dumps))


def known_by(weights: Any, biases: Any, gates: tuple[Any, Any, Any, Any], routing: Any, activation: Any) -> Any:
    """By what a call without norms and slopes is known again; None where it is not one to be kept.

    ``gates`` are logits, weights, biases and norms.
    """
    logits, gate_weights, gate_biases, gate_norms = gates
    if _torch.compiling() or torch.is_grad_enabled():
        return None
    if logits is not None or gate_norms is not None or type(routing) is not Routing:
        return None
    return (weights, biases, gate_weights, gate_biases, routing, activation) if type(activation) is str else None
