"""What utilities of PyTorch do to the matrices of a compact SNR."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import mtlkernels as mk


def _pruned(weights: Any) -> None:
    prune.l1_unstructured(weights, "0", amount=0.5)


def _pruned_for_good(weights: Any) -> None:
    _pruned(weights)
    prune.remove(weights, "0")


def _parametrized(weights: Any) -> None:
    parametrize.register_parametrization(weights, "0", nn.Tanh())


def _frozen(weights: Any) -> None:
    weights.register_buffer("0", weights._parameters.pop("0").detach())


@pytest.mark.parametrize("edit", [_pruned, _pruned_for_good, _parametrized, _frozen])
def test_matrices_of_compact_keep_their_routes(edit: Any) -> None:
    """Utilities of PyTorch put a parameter elsewhere, and one that is back comes last in its list."""
    model, x = mk.nn.SNR(10, 2, (7, 6), (3,), init_log_alpha=1.0), torch.randn(5, 10)
    compact = model.compact()
    joint = compact.joints[0]
    edit(joint.weights)
    expected = copy.deepcopy(model).eval()
    with torch.no_grad():
        for (i, j), matrix in zip(joint._open, list(joint.weights), strict=True):
            expected.joints[0].weight[i, j] = matrix
        torch.testing.assert_close(compact(x), expected(x))
