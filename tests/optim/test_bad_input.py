"""Mistakes are named before anything is modified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests.optim.model import Model, assert_close, grads_of


def mistakes() -> list[tuple[str, Callable[[Model], Any], type[Exception], str]]:
    return [
        ("none", lambda m: [], ValueError, "losses must hold the loss of at least one task, got none"),
        ("kind", lambda m: 3.0, TypeError, "losses must be a sequence of tensors, one a task, got float"),
        ("generator", lambda m: iter(m()), TypeError, "losses must be a sequence .*, got list_iterator"),
        ("scalar", lambda m: sum(m()), ValueError, r"losses must be a sequence .*\[T\], got shape \[\]"),
        ("entry", lambda m: [m()[0], 1.0], TypeError, r"losses\[1\] must be a tensor, got float"),
        ("shape", lambda m: [m()[0], m.trunk(m.x)], ValueError, r"losses\[1\] must be a scalar, got shape \[16, 4\]"),
        ("detached", lambda m: [*m()[:2], m()[2].detach()], ValueError, r"losses\[2\] must require gradients"),
        (
            "complex",
            lambda m: [m()[0], m()[1] * 1j],
            TypeError,
            r"losses\[1\] must be float32, .*, got torch.complex128",
        ),
        ("vector", lambda m: torch.stack(m()).detach(), ValueError, "losses must require gradients"),
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_losses() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    nested = torch.nested.nested_tensor([torch.ones(1)] * 3, requires_grad=True)
    given: list[tuple[Any, str]] = [(nested, "losses"), ([nested], r"losses\[0\]")]
    for losses, name in given:
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got a nested one"):
            optimizer.pc_backward(losses)


@pytest.mark.parametrize(("losses", "kind", "message"), [m[1:] for m in mistakes()], ids=[m[0] for m in mistakes()])
def test_wrong_losses(losses: Callable[[Model], Any], kind: type[Exception], message: str) -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    optimizer.pc_backward(model())
    before = grads_of(model.parameters())
    with pytest.raises(kind, match=message):
        optimizer.pc_backward(losses(model))
    assert_close(grads_of(model.parameters()), before, rtol=0, atol=0)


def test_wrong_constructor_arguments() -> None:
    model = Model()
    sgd = torch.optim.SGD(model.trunk.parameters())
    used = iter(model.trunk.parameters())
    list(used)
    for arguments, kind, message in (
        ({"optimizer": model}, TypeError, "optimizer must be a torch.optim.Optimizer, got Model"),
        ({"optimizer": mk.optim.PCGrad(sgd)}, TypeError, "optimizer must be one that is not wrapped yet, got PCGrad"),
        ({"beside": sgd}, TypeError, "beside must be a sequence of optimizers, got SGD"),
        ({"beside": [sgd, model]}, TypeError, r"beside\[1\] must be a torch.optim.Optimizer, got Model"),
        ({"shared": model.trunk}, TypeError, "shared must be an iterable of parameters or None, got Sequential"),
        ({"shared": model.trunk[0].weight}, TypeError, "shared must be an iterable of parameters .*, got Parameter"),
        ({"shared": 3}, TypeError, "shared must be an iterable of parameters or None, got int"),
        ({"shared": model.trunk.named_parameters()}, TypeError, r"shared\[0\] must be a parameter, got tuple"),
        ({"shared": model.heads.parameters()}, ValueError, r"shared\[0\] must be a parameter of the optimizer"),
        ({"shared": used}, ValueError, "shared must hold at least one parameter, got none"),
        ({"reduction": "max"}, ValueError, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"batched": 1}, TypeError, "batched must be True, False or None, got int"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be positive and finite"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got int"),
    ):
        with pytest.raises(kind, match=message):
            mk.optim.PCGrad(**{"optimizer": sgd, **arguments})


def test_what_cannot_be_trained() -> None:
    frozen = torch.zeros(2)
    wanted = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="optimizer must hold a parameter that requires gradients, got none"):
        mk.optim.PCGrad(torch.optim.SGD([frozen])).pc_backward([wanted.sum()])
    odd = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="shared parameter 1 must be float32, .*, got torch.complex64"):
        mk.optim.PCGrad(torch.optim.SGD([wanted, odd])).pc_backward([wanted.sum()])
    elsewhere = torch.zeros(2, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match="shared parameter 1 must be on cpu as the first one is, got meta"):
        mk.optim.PCGrad(torch.optim.SGD([wanted, elsewhere])).pc_backward([wanted.sum()])
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler or None, got float"):
        mk.optim.PCGrad(torch.optim.SGD([wanted])).pc_backward([wanted.sum()], scaler=2.0)  # type: ignore[arg-type]
    assert wanted.grad is None


def test_what_cannot_be_batched() -> None:
    model = Model(sparse=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), batched=True)
    with pytest.raises(RuntimeError, match="(?s)batched backward pass has failed: .*\nIf an operator cannot"):
        optimizer.pc_backward(model())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_errors_of_others_in_a_batched_pass(kind: type[RuntimeError]) -> None:
    """They come first, and a lack of memory stays one."""

    def hook(_: Tensor) -> None:
        raise kind("no room")

    model = Model()
    losses = model()
    losses[0].register_hook(hook)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), batched=True)
    with pytest.raises(kind, match="(has failed: |^)no room"):
        optimizer.pc_backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_generators_of_another_kind() -> None:
    """Set later, too."""
    generator = torch.Generator()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(Model().parameters()), generator=generator)
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, got int"):
        optimizer.generator = 3  # type: ignore[assignment]
    assert optimizer.generator is generator
