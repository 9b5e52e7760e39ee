"""What users do with a model between its training steps, with batch norm fused in training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests.convert.models import by_name, features, mmoe, ple, rechub_mmoe, rechub_ple
from tests.ops.agreement import assert_as_exact

ROWS = 60
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Any]]] = {
    "rechub PLE": (rechub_ple, by_name),
    "rechub MMOE": (rechub_mmoe, by_name),
    "deepctr PLE": (lambda: ple(dnn_use_bn=True, num_levels=1), lambda x: x),
    "deepctr MMOE": (lambda: mmoe(dnn_use_bn=True), lambda x: x),
}


def x_of(name: str, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    return MODELS[name][1](features(ROWS, seed).to(dtype))


def step(model: Any, optimizer: Any, x: Any) -> Tensor:
    y: Tensor = model(x)
    optimizer.zero_grad()
    (y - 0.3).square().sum().backward()
    optimizer.step()
    return y.detach()


def adam(model: Any) -> torch.optim.Adam:
    # Weight decay, since biases in front of batch norm have gradients of nothing but rounding, which Adam magnifies.
    return torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1.0)


def converts_first(model: Any) -> tuple[Any, Any]:
    mk.convert(model)
    return model, adam(model)


def converts_later(model: Any) -> tuple[Any, Any]:
    optimizer = adam(model)
    mk.convert(model)
    return model, optimizer


def copied(model: Any) -> tuple[Any, Any]:
    mk.convert(model)
    return converts_later(copy.deepcopy(model))


def pickled(model: Any) -> tuple[Any, Any]:
    mk.convert(model)
    return converts_later(pickle.loads(pickle.dumps(model)))


def reverted(model: Any) -> tuple[Any, Any]:
    mk.convert(model)
    mk.revert(model)
    return model, adam(model)


STARTS = [converts_first, converts_later, copied, pickled, reverted]


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_as_the_librarys(name: str, start: Callable[[Any], tuple[Any, Any]]) -> None:
    """In float64, where both agree to its rounding; with a checkpoint in the middle."""
    original = MODELS[name][0]().double()
    model, optimizer = start(copy.deepcopy(original))
    other = adam(original)
    for seed in range(4):
        expected, found = step(original, other, x_of(name, seed)), step(model, optimizer, x_of(name, seed))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        if seed == 1:
            state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
            step(model, optimizer, x_of(name, 99))
            model.load_state_dict(state, strict=True)
            optimizer.load_state_dict(moments)
        if seed == 2:
            with torch.no_grad():
                assert_serves_alike(model, original, name)
    keys = {key for key in original.state_dict() if not key.startswith("shared_gate_dnn.0.bn.")}  # of the dead gate
    for key in keys:
        torch.testing.assert_close(model.state_dict()[key], original.state_dict()[key], rtol=1e-9, atol=1e-9)
    assert list(model.state_dict()) == list(original.state_dict())


def assert_serves_alike(model: Any, original: Any, name: str) -> None:
    torch.testing.assert_close(model.eval()(x_of(name, 7)), original.eval()(x_of(name, 7)), rtol=1e-9, atol=1e-9)
    model.train()
    original.train()


@pytest.mark.parametrize("name", MODELS)
def test_assigned_and_moved_parameters_are_trained(name: str) -> None:
    """``load_state_dict(assign=True)`` and ``.to()`` give new tensors, which the next step reads and writes."""
    original = MODELS[name][0]()
    model = copy.deepcopy(original)
    mk.convert(model)
    original.double()
    model.double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(copy.deepcopy(original.state_dict()), assign=True)
    for m in (model, original):
        m(x_of(name, 0)).square().sum().backward()
    for (key, found), expected in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), key
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


# torch.compile itself instantiates an autograd Function as it traces it, and its backend uses torch.jit.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("name", ["rechub PLE", "deepctr MMOE"])
def test_compiles_in_training(name: str, fresh_compiler: None) -> None:
    model = MODELS[name][0]().double()
    mk.convert(model)
    other = copy.deepcopy(model)
    compiled: Any = torch.compile(other, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        results = []
        for m, run in ((model, model), (other, compiled)):
            m.zero_grad()
            y = run(x_of(name, seed))
            y.square().sum().backward()
            results.append((y.detach(), [p.grad for p in m.parameters() if p.grad is not None], list(m.buffers())))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_in_training(name: str) -> None:
    model = MODELS[name][0]()
    other = copy.deepcopy(model)
    mk.convert(other)
    x = x_of(name, 0, torch.float32)
    exact = copy.deepcopy(model).double()(x_of(name, 0))
    found = []
    for m in (model, other):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        y.float().square().sum().backward()
        found.append(y)
        assert all(bool(p.grad.isfinite().all()) for p in m.parameters() if p.grad is not None)
    assert_as_exact(found[1], exact, found[0])


@pytest.mark.parametrize("name", MODELS)
def test_one_row_fails_as_before(name: str) -> None:
    make, arguments = MODELS[name]
    model = make()
    mk.convert(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(arguments(features(1).float()))
