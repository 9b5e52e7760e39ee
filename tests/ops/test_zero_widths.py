"""Layers of no features and batches of no rows give what PyTorch gives: nothing, zeros, the next layer's biases."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import poisoned_outputs

OP = "expert_mixture"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["reference", *_extension.instruction_sets()])
def test_every_operator(name: str) -> None:
    """In a process of its own, which a division by zero would kill."""
    command = [sys.executable, "-m", "tests.ops.zero_widths", name]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and " 0 failed" in run.stdout, run.stdout[-5000:]


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
