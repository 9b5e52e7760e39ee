"""Biases that are no parameters of their layer, as pruning makes them, or are buffers: they count all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mtlkernels as mk


def _pruned(layer: nn.Linear) -> None:
    prune.random_unstructured(layer, "bias", 0.25)


def _buffer(layer: nn.Linear) -> None:
    bias = layer.bias.detach() + 1
    del layer.bias
    layer.register_buffer("bias", bias)


def _attribute(layer: nn.Linear) -> None:
    bias = layer.bias.detach() + 1
    del layer.bias
    layer.bias = bias


@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize("which", ["all", "first", "gate"])
@pytest.mark.parametrize("change", [_pruned, _buffer, _attribute])
def test_all_biases_count(change: Callable[[nn.Linear], None], which: str, forced: str | None) -> None:
    model = mk.nn.MMoE(20, 2, (12, 8), num_experts=3)
    x, level = torch.randn(6, 20), model.level
    if which == "gate":
        level.gates.bias = nn.Parameter(torch.randn(6))
        change(level.gates)
    for expert in level.experts if which != "gate" else ():
        for layer in expert.linears if which == "all" else expert.linears[:1]:
            change(layer)
        if which == "first":
            break
    expected: Any = level._by_modules([x])
    with mk.use_backend(forced) if forced else torch.enable_grad():
        trained = model(x)
        torch.testing.assert_close(trained, expected)
        if change is _pruned and which != "gate":
            trained[0].sum().backward()
            assert level.experts[0].linears[0].bias_orig.grad is not None
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("change", [_buffer, _attribute])
def test_a_bias_beside_a_norm(change: Callable[[nn.Linear], None]) -> None:
    """In a layer that had none."""
    model = mk.nn.MMoE(20, 2, (12, 8), num_experts=3, batch_norm=True).eval()
    layer: Any = model.level.experts[0].linears[0]
    layer.bias = nn.Parameter(torch.randn(12))
    change(layer)
    x = torch.randn(6, 20)
    with torch.no_grad():
        expected = model.level._by_modules([x])
        for _ in range(5):
            torch.testing.assert_close(model(x), expected)
