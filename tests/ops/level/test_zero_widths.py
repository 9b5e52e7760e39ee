"""Layers of no features give what PyTorch's modules give: nothing, zeros, the next layer's biases."""

from __future__ import annotations

import warnings
from itertools import chain, pairwise

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.testing import poisoned_outputs


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("widths", [(6, 0), (6, 0, 3), (6, 3, 0), (0, 4, 2), (0, 0), (6, 4, 0, 2)], ids=str)
def test_against_modules(widths: tuple[int, ...], rows: int, backend: str) -> None:
    """A level of three experts and two gates that are linear layers, and all gradients."""
    routing = mk.Routing.mmoe(3, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        layers = [[nn.Linear(*sizes) for _ in range(3)] for sizes in pairwise(widths)]
        gates = [nn.Linear(widths[0], 3) for _ in range(2)]
    x = torch.randn(rows, widths[0], requires_grad=True)
    parameters = [p for module in (*chain(*layers), *gates) for p in module.parameters()]

    def by_modules() -> list[Tensor]:
        experts = []
        for e in range(3):
            y = x
            for layer in layers:
                y = layer[e](y).relu()
            experts.append(y)
        return [torch.einsum("be,beh->bh", gate(x).softmax(1), torch.stack(experts, 1)) for gate in gates]

    def fused() -> list[Tensor]:
        weights, biases = ([[getattr(m, name) for m in layer] for layer in layers] for name in ("weight", "bias"))
        linear = {"gate_weights": [gate.weight for gate in gates], "gate_biases": [gate.bias for gate in gates]}
        return list(mk.expert_mixture(x, weights, biases, None, routing, **linear))

    results = []
    for run in (by_modules, fused):
        with mk.use_backend(backend), poisoned_outputs():
            outputs = run()
            grads = torch.autograd.grad(outputs, [x, *parameters], [torch.ones_like(y) for y in outputs])
            with torch.no_grad():
                results.append([*outputs, *grads, *run()])
    torch.testing.assert_close(results[1], results[0])
