"""The same results as the PCGrad of pytorch-optimizer 4.1.0 and of TorchJD 0.18, whose differences are options here."""

from __future__ import annotations

import random
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGrad, PCGradWeighting, Weighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad

import mtlkernels as mk
from mtlkernels.optim import pcgrad as module


def shuffled(num_tasks: int) -> list[list[int]]:
    """The order in which pytorch-optimizer projects from here on: it shuffles one list again for each task."""
    state = random.getstate()
    tasks, order = list(range(num_tasks)), []
    for _ in range(num_tasks):
        random.shuffle(tasks)
        order.append(list(tasks))
    random.setstate(state)
    return order


def permuted(num_tasks: int) -> Tensor:
    """The order in which TorchJD projects from here on."""
    state = torch.get_rng_state()
    order = torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)])
    torch.set_rng_state(state)
    return order


def conflicting(num_tasks: int, size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator)
    signs = torch.randn(num_tasks, 1, generator=generator)
    return (torch.randn(num_tasks, size, generator=generator) + signs * common).to(dtype)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.heads = nn.ModuleList(nn.Linear(3, 1).double() for _ in range(4))
        self.unused = nn.Linear(2, 2).double()

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [(head(hidden) - t).square().mean() for head, t in zip(self.heads, y, strict=True)]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 4), (4, 9, 1)))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_pytorch_optimizer(reduction: str, seed: int) -> None:
    grads = conflicting(5, 12, seed)
    theirs = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    wrapper = pytorch_optimizer.PCGrad(torch.optim.SGD([theirs]), reduction=reduction)
    random.seed(seed)
    order = shuffled(5)
    wrapper.pc_backward([row @ theirs for row in grads])
    found = mk.pcgrad(grads, order=order, reduction=reduction, include_self=True)
    torch.testing.assert_close(found, theirs.grad)


def test_projection_onto_oneself_is_a_difference() -> None:
    """So that include_self is what makes the comparison above pass."""
    differs = 0
    for seed in range(100):
        grads = conflicting(8, 3, seed)
        random.seed(seed)
        order = shuffled(8)
        with_self, without = (mk.pcgrad(grads, order=order, include_self=flag) for flag in (True, False))
        differs += not torch.allclose(with_self, without)
    assert differs


def both_wrappers(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Model, Model]:
    """One backward pass by our wrapper and one by theirs, in the same order."""
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    random.seed(7)
    order, draw = shuffled(4), module.draw_order
    monkeypatch.setattr(module, "draw_order", lambda _, __, *rest, **kept: draw(order, None, *rest, **kept))
    reduction = options.get("reduction", "mean")
    mk.optim.PCGrad(torch.optim.SGD(ours.parameters()), include_self=True, **options).pc_backward(ours(*batch()))
    pytorch_optimizer.PCGrad(torch.optim.SGD(theirs.parameters()), reduction=reduction).pc_backward(theirs(*batch()))
    return ours, theirs


def test_wrapper_of_pytorch_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both_wrappers(monkeypatch, reduction="sum")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.startswith("unused"):
            assert a.grad is None and b.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_mean_of_pytorch_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs divides what all tasks reach, and only adds up the heads; ours divides the heads as well."""
    ours, theirs = both_wrappers(monkeypatch)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad * (4 if name.startswith("heads") else 1), b.grad)


@pytest.mark.parametrize("seed", range(12))
def test_weights_of_torchjd(seed: int) -> None:
    grads = conflicting(6, 9, seed)
    gram = mk.gram(grads)
    torch.manual_seed(seed)
    order = permuted(6)
    theirs = PCGradWeighting()(gram)
    torch.testing.assert_close(mk.pcgrad_weights(gram, order).sum(0), theirs)
    torch.manual_seed(seed)
    torch.testing.assert_close(mk.pcgrad(grads, order=order), PCGrad()(grads))


def test_step_of_torchjd() -> None:
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    trunk = list(theirs.trunk.parameters())
    torch.manual_seed(5)
    order = permuted(4)
    losses = ours(*batch())
    rows = [torch.autograd.grad(loss, list(ours.trunk.parameters()), retain_graph=True) for loss in losses]
    found = mk.pcgrad([list(row) for row in rows], order=order)
    backward(theirs(*batch()), inputs=trunk)
    jac_to_grad(trunk, PCGrad())
    for a, parameter in zip(found, trunk, strict=True):
        torch.testing.assert_close(a, parameter.grad)


class Weights(Weighting):
    """mk.pcgrad_weights where TorchJD wants a weighting of a Gramian."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        return mk.pcgrad_weights(gramian.double()).sum(0).to(gramian.dtype)


def test_as_a_weighting_of_torchjd() -> None:
    """The Gramian comes from TorchJD's engine, which never forms the Jacobian."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(9, 4), torch.randn(9, 3)
    engine, weighting = Engine(model, batch_dim=None), Weights()
    losses = (model(x) - y).square().mean(0)
    weights = weighting(engine.compute_gramian(losses))
    assert weights.dtype == losses.dtype and weights.shape == (3,)
    losses.backward(weights)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())  # type: ignore[arg-type]
    for seed in range(8):  # the same function of a Gramian as theirs, if the tasks are two: there is one order then
        gram = mk.gram(conflicting(2, 5, seed)).float()
        torch.testing.assert_close(weighting(gram), PCGradWeighting()(gram))
