"""What may happen to the memory of a level's parameters: others take its place, or it goes."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import mtlkernels as mk
from tests import requires

pytestmark = requires.cpp_kernels
WIDTH = 64


@pytest.mark.parametrize("way", ["serving", "serving with norms", "training"])
def test_another_thread_gives_parameters_other_memory(way: str) -> None:
    """As `.data` and `Module.to` do: each call sees each weight as it was before or after."""
    grad, norms = way == "training", way == "serving with norms"
    model: Any = mk.nn.MMoE(WIDTH, 2, (WIDTH,), 4, activation="none", batch_norm=norms).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eps = 0.0
    experts = [expert.linears[0] for expert in model.level.experts]
    for layer in experts:
        layer.weight.data = torch.ones(WIDTH, WIDTH)
        if layer.bias is not None:
            layer.bias.data.zero_()
    model.level.gates.weight.data.zero_()
    x, stop, wrong, calls = torch.ones(WIDTH, WIDTH), False, [], 0

    def call() -> None:
        nonlocal calls
        with torch.set_grad_enabled(grad):
            while not stop:
                found = model(x)[0].detach()
                calls += 1
                fourths = found / (WIDTH / 4)  # the sum of four experts' weights, from 1 to 9
                if not (fourths.eq(fourths.round()).all() and fourths.min() >= 4 and fourths.max() <= 36):
                    wrong.append(found)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    end, swaps = time.monotonic() + 1.5, 0
    while time.monotonic() < end:
        swaps += 1
        for layer in experts:
            layer.weight.data = torch.full((WIDTH, WIDTH), 1.0 + swaps % 9)
    stop = True
    for thread in threads:
        thread.join()
    assert calls > 10 and swaps > 10 and not wrong


@pytest.mark.parametrize("left", [0, 16])
@pytest.mark.parametrize("kept", [False, True])
def test_memory_that_is_gone_is_refused(kept: bool, left: int) -> None:
    """As where parameters are gathered for a call only."""
    model: Any = mk.nn.MMoE(16, 2, (12, 8), num_experts=2).eval()
    x = torch.randn(5, 16)
    with torch.no_grad():
        for _ in range(5 if kept else 0):
            model(x)
        model.level.experts[0].linears[0].weight.untyped_storage().resize_(left)
        with pytest.raises((ValueError, RuntimeError), match="768 bytes|out of bounds"):
            model(x)


@pytest.mark.parametrize("options", [{"activation": "prelu"}, {"batch_norm": True}, {"dropout": 0.3}], ids=str)
def test_gates_whose_memory_is_gone_are_refused(options: dict[str, Any]) -> None:
    """Where they are one product in Python, forward, and backward after the memory went in between."""
    model: Any = mk.nn.MMoE(16, 2, (12, 8), num_experts=3, **options)
    x = torch.randn(5, 16, requires_grad=True)
    loss = sum(y.sum() for y in model(x))
    model.level.gates.weight.untyped_storage().resize_(0)
    for call in (loss.backward, lambda: model(x)):
        with pytest.raises((ValueError, RuntimeError), match="must have [0-9]+ bytes of memory, got 0|out of bounds"):
            call()


def test_values_that_are_not_in_memory_as_they_are() -> None:
    """PyTorch's bit for negated tensors, in lists that its dispatcher does not look into, and zeros without memory."""
    routing = mk.Routing.mmoe(3, 2)
    x, weights = torch.randn(6, 5), [torch.randn(3, 4, 5)]
    logits = torch.randn(6, 6, dtype=torch.complex64).conj().imag
    assert logits.is_neg()
    for given in (logits, list(logits.split(3, 1))):
        for grad in (False, True):
            own = [weight.clone().requires_grad_(grad) for weight in weights]
            found = mk.expert_mixture(x, own, None, given, routing)
            expected = mk.expert_mixture(x, own, None, logits.resolve_neg().clone(), routing)
            torch.testing.assert_close(found, expected)
    own = [weights[0].clone().requires_grad_()]
    outputs = mk.expert_mixture(x, own, None, logits, routing)
    cotangent = torch.randn(6, 4, dtype=torch.complex64).conj().imag
    (found_grad,) = torch.autograd.grad(outputs, own, [cotangent, torch._efficientzerotensor(6, 4)], retain_graph=True)
    (wanted,) = torch.autograd.grad(outputs, own, [cotangent.resolve_neg().clone(), torch.zeros(6, 4)])
    torch.testing.assert_close(found_grad, wanted)


def test_negated_gradients() -> None:
    grads = [[torch.tensor([3.0, 2.0])], [torch.tensor([0.0, 1.0])]]
    negated = [[torch._neg_view(-grad[0])] if task == 0 else grad for task, grad in enumerate(grads)]
    assert negated[0][0].is_neg()
    torch.testing.assert_close(mk.gram(negated), mk.gram(grads))
