"""A signal's handler raises amid a call: ``.grad`` is written as a whole or not at all, and the next call is right.

Python runs handlers between its own instructions. A tracing function stands in for one here: it raises at each line in
turn, and at each call of a function, of the optimizers' own code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import optim
from mtlkernels.optim._task_gradients import task_gradients

OWN = str(Path(optim.__file__).parent)


class Interrupt(BaseException):
    """As KeyboardInterrupt, which ends the run of the tests where it gets out."""


@pytest.fixture(autouse=True)
def _recording() -> Iterator[None]:
    """So that a test that fails leaves the others alone."""
    yield
    torch.set_grad_enabled(True)


def is_interrupted(call: Callable[[], Any], at: int) -> bool:
    """Whether ``call`` came to its event ``at``, at which it is interrupted."""
    left = at

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(OWN) or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return None  # generators are closed where nobody hears of an exception
        if event in ("call", "line"):
            left -= 1
            if left < 0:
                raise Interrupt
        return trace

    usual = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(usual)
    return False


class Model(nn.Module):
    """Two tasks on a layer and a table, whose gradients may be sparse; a head that is nobody's to project."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(7, 3, sparse=sparse)
        self.trunk, self.head = nn.Linear(3, 2), nn.Linear(2, 2)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self) -> list[Tensor]:
        return list(self.head(self.trunk(self.table(torch.tensor([1, 4, 1])))).square().mean(0))

    def wrapped(self) -> mk.optim.PCGrad:
        shared = [*self.table.parameters(), *self.trunk.parameters()]
        return mk.optim.PCGrad(torch.optim.SGD(self.parameters()), shared=shared)

    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.detach().to_dense().clone() for p in self.parameters()]


def sparse_ones(table: nn.Embedding) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[2, 4]]), torch.ones(2, 3), table.weight.shape, check_invariants=True)


def without(model: Model) -> None:
    model.zero_grad()


def with_all(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def with_some(model: Model) -> None:
    """Gradients that are the first, and of both layouts before."""
    model.zero_grad()
    model.table.weight.grad = sparse_ones(model.table)
    model.trunk.weight.grad = torch.ones(2, 3)
    model.head.bias.grad = torch.ones(2)


CASES = pytest.mark.parametrize(
    ("before", "sparse"),
    [(without, False), (with_all, False), (with_all, True), (with_some, False), (with_some, True)],
)


def same(found: list[Tensor | None], wanted: list[Tensor | None]) -> bool:
    return all(
        (f is None) == (w is None) and (f is None or w is None or torch.equal(f, w))
        for f, w in zip(found, wanted, strict=True)
    )


def whole_call(
    before: Callable[[Model], None], sparse: bool
) -> tuple[Model, mk.optim.PCGrad, list[Tensor | None], list[Tensor | None]]:
    """A model and its optimizer, and the gradients before and after a call that nothing interrupts."""
    model = Model(sparse=sparse)
    optimizer = model.wrapped()
    before(model)
    old = model.grads()
    optimizer.pc_backward(model())
    return model, optimizer, old, model.grads()


@CASES
def test_gradients_are_whole_or_not_there(before: Callable[[Model], None], sparse: bool) -> None:
    model, optimizer, old, new = whole_call(before, sparse)
    assert not same(old, new)
    at, seen = 0, {False: 0, True: 0}
    while True:
        before(model)
        dense = {p: p.grad for p in model.parameters() if p.grad is not None and not p.grad.is_sparse}
        losses = model()
        interrupted = is_interrupted(lambda losses=losses: optimizer.pc_backward(losses), at)  # type: ignore[misc]
        found = model.grads()
        assert same(found, new) or (interrupted and same(found, old)), f"half written at {at}"
        assert all(parameter.grad is grad for parameter, grad in dense.items()), "added in place"
        if not interrupted:
            break
        seen[same(found, new)] += 1
        at += 1
    assert seen[False] > 20


@CASES
@pytest.mark.parametrize("late", [False, True])
def test_around_the_sums_in_place(
    before: Callable[[Model], None], sparse: bool, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before them all is put back; as soon as they are made nothing is."""
    model, optimizer, old, new = whole_call(before, sparse)
    before(model)
    add = torch._foreach_add_

    def interrupted(*args: Any) -> None:
        if late:
            add(*args)
        raise Interrupt

    monkeypatch.setattr(torch, "_foreach_add_", interrupted)
    if before is without:  # nothing to add to
        optimizer.pc_backward(model())
        assert same(model.grads(), new)
        return
    with pytest.raises(Interrupt):
        optimizer.pc_backward(model())
    assert same(model.grads(), new if late else old)
    monkeypatch.undo()
    before(model)
    optimizer.pc_backward(model())
    assert same(model.grads(), new), "the next call is right"


def test_passes_that_leave_gradients_put_them_back() -> None:
    """As those of FSDP are: until the last task's, ``.grad`` of before stands aside."""
    model = Model(sparse=False)
    parameters = list(model.parameters())
    with_all(model)
    before = [parameter.grad for parameter in parameters]
    at = 0
    while True:
        losses = model()

        def passes(losses: list[Tensor] = losses) -> None:
            task_gradients(losses, parameters, [], mean=True, how="backward")

        interrupted = is_interrupted(passes, at)
        assert all(p.grad is grad for p, grad in zip(parameters, before, strict=True)), f"not put back at {at}"
        if not interrupted:
            break
        at += 1
    assert at > 20


def test_gradients_are_recorded_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the handler raises as ``torch.no_grad`` is about to turn that on again."""
    model = Model(sparse=False)
    optimizer = model.wrapped()
    losses = model()

    def interrupted(*_: Any) -> None:
        raise Interrupt

    monkeypatch.setattr(torch.no_grad, "__exit__", interrupted)
    with pytest.raises(Interrupt):
        optimizer.pc_backward(losses)
    monkeypatch.undo()
    assert torch.is_grad_enabled()
    optimizer.pc_backward(model())
