"""Backward passes that come to a level while it is to run for several losses; and after that was broken off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.ops.level import passes
from mtlkernels.ops.level.node import Losses, level_of
from tests import requires
from tests.ops.level.test_losses import ple


def _trunk(batch_norm: bool) -> tuple[Any, list[Tensor]]:
    """A node that C++ has made, or the Function's; both are run by one loss's pass for two."""
    torch.manual_seed(0)
    trunk = mk.nn.MMoE(5, 2, (6, 4), num_experts=3, batch_norm=batch_norm)
    return trunk, list(trunk(torch.randn(7, 5)))


def _surgery(trunk: Any, losses: list[Tensor], batched: bool | None) -> list[Tensor | None]:
    trunk.zero_grad()
    generator = torch.Generator().manual_seed(0)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(trunk.parameters()), batched=batched, generator=generator)
    optimizer.pc_backward(losses)
    return [p.grad for p in trunk.parameters()]


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_pass_within_a_hook(batch_norm: bool, task: int) -> None:
    """Gradient norms of a shared layer, as GradNorm asks for them; of the losses the last one's pass runs the level."""
    seen: dict[Any, list[Any]] = {None: [], False: []}
    found = []
    for batched, own in seen.items():
        trunk, outputs = _trunk(batch_norm)
        weights = [expert.linears[0].weight for expert in trunk.level.experts]

        def probe(grad: Tensor | None, own: Any = own, y: Any = outputs[1 - task], weights: Any = weights) -> None:
            if grad is not None:  # which comes with the pass within
                ones = torch.ones_like(y)
                own.append(torch.autograd.grad(y, weights, ones, retain_graph=True, allow_unused=True))

        outputs[task].register_hook(probe)
        found.append(_surgery(trunk, [y.square().mean() for y in outputs], batched))
    assert seen[None] and all(grad is not None for grads in seen[None] for grad in grads)
    torch.testing.assert_close(seen[None], seen[False])
    torch.testing.assert_close(*found)


def _hooked(node: Any, hook: Callable[..., Any], before: bool) -> None:
    node.register_prehook(lambda grads: hook(grads)) if before else node.register_hook(lambda into, _: hook(into))


@requires.cpp_kernels
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_hooks_on_the_node_see_each_loss(batch_norm: bool, before: bool) -> None:
    found = []
    for batched in (None, False):
        trunk, outputs = _trunk(batch_norm)
        calls: list[int] = []

        def clamp(grads: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return tuple(None if grad is None else grad.clamp(-0.01, 0.01) for grad in grads)

        _hooked(outputs[0].grad_fn, clamp, before)
        found.append(_surgery(trunk, [y.sum() for y in outputs], batched))
        assert len(calls) == 2
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_losses_that_are_gone(batch_norm: bool) -> None:
    """An interrupt may come where the nodes are to be told that it is over."""
    trunk, outputs = _trunk(batch_norm)
    level, losses = level_of(outputs[0].grad_fn), Losses(2)
    losses.mark = torch.ones((), requires_grad=True).clone().grad_fn
    level.losses = losses
    del losses
    grads = torch.autograd.grad(outputs[0].sum(), list(trunk.parameters()), retain_graph=True, allow_unused=True)
    level.losses = None
    expected = torch.autograd.grad(outputs[0].sum(), list(trunk.parameters()), allow_unused=True)
    torch.testing.assert_close(grads, expected)


def test_an_interrupt_while_levels_run() -> None:
    """The graph is as it was, but for what the pass has freed."""
    model, x = ple()
    losses = [y.square().sum() for y in model(x)]
    with mock.patch.object(passes, "_gradients", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        passes.differentiate([([loss], None) for loss in losses], passes.cut(losses), [])
    parameters = list(model.parameters())
    grads = torch.autograd.grad(losses[0], parameters, allow_unused=True)
    torch.testing.assert_close(grads, torch.autograd.grad(model(x)[0].square().sum(), parameters, allow_unused=True))
