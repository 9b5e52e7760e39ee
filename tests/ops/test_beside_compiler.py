"""Calls in one thread while another one compiles or exports, of which PyTorch tells every thread that it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from mtlkernels import _torch
from tests.convert.models import rechub_ple

X = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "MMoE": lambda: mk.nn.MMoE(16, 2, (12, 8), 3, activation="tanh"),
    "CGC with hidden layers in its gates": lambda: mk.nn.CGC(16, 2, (12, 8), 2, 1, gate_units=(6,), activation="tanh"),
    "PLE with batch norm": lambda: mk.nn.PLE(16, 2, (12, 8), 2, 1, activation="tanh", batch_norm=True),
    "SNR": lambda: mk.nn.SNR(16, 2, (12, 8), (3, 2), activation="tanh"),
}


class Waits(nn.Module):
    """Its forward, which torch.export runs, does not end before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.told = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.told.wait(60)
        return x + 1


@pytest.fixture
def exporting() -> Iterator[None]:
    """Another thread is in the middle of an export."""
    module = Waits()
    thread = threading.Thread(target=lambda: torch.export.export(module, (X,), strict=False))
    thread.start()
    try:
        assert module.begun.wait(60)
        assert torch.compiler.is_compiling()  # although this thread does not
        yield
    finally:
        module.told.set()
        thread.join()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TRUNKS[name]().eval()


def penalty(trunk: nn.Module) -> list[Tensor]:
    """Gradients of a gradient's square, as gradient penalties have them."""
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(sum(y.square().sum() for y in trunk(x)), x, create_graph=True)
    return list(torch.autograd.grad(first.square().sum(), [x, *trunk.parameters()], allow_unused=True))


EXPECTED = {name: penalty(made(name)) for name in TRUNKS}


@pytest.mark.parametrize("name", TRUNKS)
def test_second_derivatives(name: str, exporting: None) -> None:
    for got, expected in zip(penalty(made(name)), EXPECTED[name], strict=True):
        assert (got is None) == (expected is None)
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_conversions_and_modes(exporting: None) -> None:
    report = str(mk.convert(rechub_ple(tasks=2)))
    assert "replaced" in report and "left alone" not in report
    trunk = made("MMoE")
    with FlopCounterMode(display=False) as counter:
        trunk(X)
    assert counter.get_total_flops() > 0
    traced = torch.jit.trace(trunk, X)
    torch.testing.assert_close(traced(X), tuple(trunk(X)))


def test_the_thread_that_compiles() -> None:
    assert not _torch.compiling()
    found: list[bool] = []

    def seen(x: Tensor) -> Tensor:
        return x + (2 if _torch.compiling() else 1)

    assert torch.equal(torch.compile(seen, backend="eager", fullgraph=True)(X), X + 2)

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.append(_torch.compiling())
            return x + 1

    torch.export.export(Noting(), (X,), strict=False)
    assert found and all(found)
