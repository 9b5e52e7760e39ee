"""Objects that stand for a wrapper: of a subclass made on the fly, with attributes looked up in it, or copied from it.

Lightning and Fabric make such ones of the first kind of all optimizers; earlier versions of Lightning, of the second.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests.optim.model import Model, assert_close, grads_of


class Proxy:
    """Hands ``step`` and checkpoints on, inherits all other methods, and has attributes of its own."""

    def __init__(self, optimizer: Any, *, copies: bool) -> None:
        if copies:
            self.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
        self._inner = optimizer
        self.__class__ = type(f"Proxy{type(optimizer).__name__}", (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._inner

    def step(self, closure: Any = None) -> Any:
        return self._inner.step(closure)

    def load_state_dict(self, state: Any) -> None:
        self._inner.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._inner, name)


copies = pytest.mark.parametrize("copies", [False, True], ids=["looks up", "copies"])


class Asked:
    """A weighting that counts its calls, each of which a matrix was made for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gram: Tensor) -> Tensor:
        self.calls += 1
        return gram.diagonal().rsqrt()


def weighted(model: Model, gram_every: int) -> mk.optim.GramWeighted:
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return mk.optim.GramWeighted(sgd, Asked(), shared=model.shared(), gram_every=gram_every)


@copies
@pytest.mark.parametrize("loads", ["proxy", "wrapper"])
def test_a_checkpoint_that_either_loads(loads: str, copies: bool) -> None:
    """The next call is exact, whichever of the two makes it."""
    for backward in ("proxy", "wrapper"):
        model = Model()
        wrapper = weighted(model, 10)
        either: dict[str, Any] = {"wrapper": wrapper, "proxy": Proxy(wrapper, copies=copies)}
        either[backward].backward(model())
        either[backward].backward(model())
        assert wrapper.weighting.calls == 1  # type: ignore[attr-defined]
        either[loads].load_state_dict(either[loads].state_dict())
        either[backward].backward(model())
        assert wrapper.weighting.calls == 2  # type: ignore[attr-defined]


@copies
def test_calls_of_both_count_together(copies: bool) -> None:
    model = Model()
    wrapper = weighted(model, 3)
    proxy: Any = Proxy(wrapper, copies=copies)
    asked = []
    for optimizer in (proxy, wrapper, proxy, wrapper, proxy, wrapper, proxy):
        optimizer.zero_grad()
        optimizer.backward(model())
        optimizer.step()
        asked.append(wrapper.weighting.calls)  # type: ignore[attr-defined]
    assert asked == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_of_a_wrapper_count_alone(clone: Any) -> None:
    model = Model()
    original = weighted(model, 2)
    original.backward(model())
    copied = clone(original)
    assert original.weighting.calls == copied.weighting.calls == 1  # type: ignore[attr-defined]
    original.load_state_dict(original.state_dict())
    own = copied.param_groups[0]["params"][0]
    before = copied.weighting.calls
    copied.backward([own.square().sum() * factor for factor in (1.0, 2.0, 3.0)])
    assert copied.weighting.calls == before, "a checkpoint that the original loads says nothing to the copy"
    original.backward(model())
    assert original.weighting.calls == 2  # type: ignore[attr-defined]


@copies
def test_copies_of_a_proxy(copies: bool) -> None:
    """A shallow one, which may have copied nothing, still stands for the same wrapper."""
    model = Model()
    proxy: Any = Proxy(weighted(model, 2), copies=copies)
    proxy.backward(model())
    again = copy.copy(proxy)
    again.backward(model())
    assert proxy.weighting.calls == again.weighting.calls == 1


@copies
def test_deep_copies_of_a_proxy(copies: bool) -> None:
    """The proxy's copy and the wrapper's within it go by one count."""
    model = Model()
    proxy: Any = Proxy(weighted(model, 10), copies=copies)
    proxy.backward(model())
    model, again = copy.deepcopy((model, proxy))
    again.load_state_dict(again.state_dict())
    again.backward(model())
    assert again.weighting.calls == 2 and proxy.weighting.calls == 1


@copies
def test_pcgrad(copies: bool) -> None:
    """A proxy trains as the wrapper does, and a generator that is set through it draws."""
    model = Model()
    wrapper = mk.optim.PCGrad(torch.optim.SGD(model.parameters(), 0.1), shared=model.shared())
    proxy: Any = Proxy(wrapper, copies=copies)
    assert isinstance(proxy, mk.optim.PCGrad) and proxy.optimizer is wrapper
    proxy.generator = generator = torch.Generator().manual_seed(1)
    assert wrapper.generator is generator
    results = []
    for optimizer in (proxy, wrapper):
        optimizer.zero_grad()
        results.append((optimizer.pc_backward(model()), grads_of(model.parameters())))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], rtol=0, atol=0)
    proxy.step()
    proxy.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
