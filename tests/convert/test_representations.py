"""LibMTL's ``rep_grad``: heads read copies of the representations, which an architecture keeps after a call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import mtlkernels as mk
from tests.convert.doubles import CGC, LibMTLMMoE

KINDS: dict[str, Any] = {
    "CGC": lambda rep_grad: CGC(8, (6, 5), rep_grad=rep_grad),
    "MMoE": lambda rep_grad: LibMTLMMoE(8, (6, 5), rep_grad=rep_grad),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, rep_grad: bool = True) -> tuple[Any, Any]:
    """A model that is converted, and one that is not."""
    torch.manual_seed(0)
    own = KINDS[kind](rep_grad).double()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    return model, own


def step(model: Any, x: Any) -> dict[str, dict[str, Any]]:
    """Outputs and gradients of a step as LibMTL's trainer makes it: of the heads, then of the trunk."""
    model.zero_grad()
    outputs = model(x)
    sum(y.square().sum() for y in outputs.values()).backward()
    of_copies = {task: kept.grad for task, kept in model.rep_tasks.items()}
    torch.autograd.backward(list(model.rep.values()), list(of_copies.values()))
    of_parameters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"outputs": outputs, "copies": of_copies, "parameters": of_parameters}


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_calls_stay_fused_with_the_same_gradients(kind: str, training: bool, fused_calls: list[int]) -> None:
    model, own = build(kind)
    model.train(training)
    own.train(training)
    for number in range(3):
        x = torch.randn(300, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        fused_calls.clear()
        found = step(model, x)
        assert len(fused_calls) == 1
        torch.testing.assert_close(found, step(own, x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), own(x))


@kinds
def test_converted_once_it_has_been_called(kind: str, fused_calls: list[int]) -> None:
    """It keeps tensors of autograd's graph then."""
    model, own = build(kind)
    x = torch.randn(300, 8, dtype=torch.float64)
    own(x)
    assert mk.convert(own).replaced
    torch.testing.assert_close(step(own, x), step(model, x))
    assert len(fused_calls) == 2


@kinds
def test_the_switch_is_seen(kind: str, fused_calls: list[int]) -> None:
    """It was off when the model was tried: the model's own code runs with it on."""
    model, _ = build(kind, rep_grad=False)
    x = torch.randn(300, 8, dtype=torch.float64)
    model(x)
    assert len(fused_calls) == 1
    model.rep_grad, model.rep, model.rep_tasks = True, {}, {}
    model(x)
    assert len(fused_calls) == 1 and list(model.rep) == model.task_name


def test_pickled_before_its_first_call(fused_calls: list[int]) -> None:
    model, own = build("CGC")
    other = pickle.loads(pickle.dumps(model))
    x = torch.randn(300, 8, dtype=torch.float64)
    torch.testing.assert_close(step(other, x), step(own, x))
    assert len(fused_calls) == 1
