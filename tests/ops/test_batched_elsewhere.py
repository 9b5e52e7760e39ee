"""Batched backward passes whose nodes run in a thread other than the caller's, as autograd has it for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._vmap_internals import _vmap  # what is_grads_batched=True calls

import mtlkernels as mk
from tests.seeding import seed

Outputs = Sequence[Tensor]


def made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def level(**options: Any) -> tuple[Callable[[], Outputs], list[Tensor]]:
    x, weights, logits = made(6, 5), [made(4, 5) for _ in range(3)], [made(6, 3) for _ in range(2)]

    def call() -> Outputs:
        return mk.expert_mixture(x, [weights], None, logits, mk.Routing.mmoe(3, 2), activation="silu", **options)

    return call, [x, *weights, *logits]


def mixture() -> tuple[Callable[[], Outputs], list[Tensor]]:
    experts, logits = made(6, 3, 4), [made(6, 3) for _ in range(2)]
    return lambda: mk.gated_mixture(experts, logits, mk.Routing.mmoe(3, 2)), [experts, *logits]


def trans() -> tuple[Callable[[], Outputs], list[Tensor]]:
    u, weight, z = [made(6, 5) for _ in range(2)], [[made(4, 5) for _ in range(2)] for _ in range(2)], made(2, 2)
    return lambda: mk.snr_trans(u, weight, z), [*u, *weight[0], *weight[1], z]


def aver() -> tuple[Callable[[], Outputs], list[Tensor]]:
    u, z = [made(6, 5) for _ in range(2)], made(2, 2)
    return lambda: mk.snr_aver(u, z), [*u, z]


CASES: dict[str, Callable[[], tuple[Callable[[], Outputs], list[Tensor]]]] = {
    "level": level,
    "norms": lambda: level(norms=[[nn.LayerNorm(4, dtype=torch.float64) for _ in range(3)]]),
    "mixture": mixture,
    "SNR-Trans": trans,
    "SNR-Aver": aver,
}


def in_another_thread(losses: Outputs, leaves: Outputs, factors: Outputs) -> Any:
    """``torch.autograd.grad`` of tensors that are batched already."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(torch.autograd.grad(losses, leaves, factors, retain_graph=True))
        except BaseException as error:
            found.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_several_losses(name: str, backend: str) -> None:
    seed(0)
    call, leaves = CASES[name]()
    with mk.use_backend(backend):
        losses = [y.square().sum() for y in call()]
        factors = torch.randn(3, len(losses), dtype=torch.float64)
        found = _vmap(lambda *own: tuple(in_another_thread(losses, leaves, own)))(*factors.unbind(1))
        expected = [torch.autograd.grad(losses, leaves, list(own), retain_graph=True) for own in factors]
    torch.testing.assert_close(list(found), [torch.stack(own) for own in zip(*expected, strict=True)])


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("name", ["level", "SNR-Trans"])
def test_one_in_another(name: str, elsewhere: bool, backend: str) -> None:
    """Each level of batching is taken off by itself, also where only some of the gradients have both."""
    seed(0)
    call, leaves = CASES[name]()
    run = in_another_thread if elsewhere else lambda *own: torch.autograd.grad(*own, retain_graph=True)
    with mk.use_backend(backend):
        losses = [y.square().sum() for y in call()]
        outer, inner = torch.randn(2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        rest = [torch.ones((), dtype=torch.float64) for _ in losses[2:]]
        found = _vmap(lambda a: _vmap(lambda b: tuple(run(losses, leaves, [a * b, a, *rest])))(inner))(outer)
        expected = [
            torch.stack(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(losses, leaves, [a * b, a, *rest], retain_graph=True)]
                    )
                    for b in inner
                ]
            )
            for a in outer
        ]
    flat = torch.cat([grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2) for grad in found], 2)
    torch.testing.assert_close(flat, torch.stack(expected))
