"""What was read of a level is kept while it holds the same modules, tensors and settings, in training too."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._convert import evaluation
from mtlkernels._convert.calls import CALLS, Readings
from tests.convert.changes import CHANGES, Level, assert_as_own_code, first, register, replace_layer, serve
from tests.convert.models import features, ple

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")

ROWS = 1100  # with which every level is fused in every mode


class HiddenGates(Level):
    """No call of it is kept as a whole, as its gates are more than linear layers."""

    hidden = True


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register(HiddenGates)


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chains of experts that were read."""
    read: list[Any] = []
    read_chain = evaluation.read_chain
    monkeypatch.setattr(evaluation, "read_chain", lambda chain: read.append(chain) or read_chain(chain))
    return read


def converted() -> Any:
    model = HiddenGates().eval()
    assert mk.convert(model).replaced
    return model


def kept() -> Any:
    """A level that has served until what is read of it is kept."""
    model = converted()
    for _ in range(4):
        serve(model, torch.ones(3, 20))
    assert len(readings(model)) == 1
    return model


def readings(model: nn.Module) -> list[Any]:
    calls = vars(model).get(CALLS)
    places = [] if calls is None else list(calls.readings(0)._places.values())
    return [place.kept for place in places if place.kept is not None]


def gradients(model: Any, x: Tensor, own: bool = False) -> dict[str, Tensor | None]:
    """Of a call in the mode that the model is in, dropout left out: by its own code where asked."""
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    sum((k + 1) * y.sin().sum() for k, y in enumerate(Level.forward(model, x) if own else model(x))).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_trains_as_own_code(model: Any, x: Tensor) -> None:
    other = copy.deepcopy(model).double()
    found, exact = gradients(model, x), gradients(other, x.double(), own=True)
    for name, gradient in exact.items():
        own = found[name]
        assert (own is None) == (gradient is None), name
        if own is not None and gradient is not None:
            torch.testing.assert_close(own.double(), gradient, rtol=1e-3, atol=1e-2, msg=name)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    model, x = kept(), torch.randn(6, 20)
    before = assert_as_own_code(model, x)
    change(model)
    after = [assert_as_own_code(model, x) for _ in range(10)]
    assert not all(torch.equal(a, b) for a, b in zip(after[0], before, strict=True)), "the change changed nothing"


@pytest.mark.parametrize("change", [change for change in CHANGES if "hook" not in change.__name__])
def test_changes_are_noticed_in_training(change: Callable[[Any], None]) -> None:
    model, x = converted().train(), torch.randn(ROWS, 20)
    for _ in range(4):
        assert_trains_as_own_code(model, x)
    assert readings(model)
    change(model)
    for _ in range(6):
        assert_trains_as_own_code(model, x)


@pytest.mark.parametrize("mode", ["serving", "training", "evaluation with gradients"])
def test_nothing_is_read_again(mode: str, chains: list[Any]) -> None:
    model = converted().train(mode == "training")
    with torch.set_grad_enabled(mode != "serving"):
        for _ in range(3):
            model(torch.randn(ROWS, 20))
        chains.clear()
        for rows in (ROWS, ROWS + 1, 2 * ROWS):
            sum(y.sum() for y in model(torch.randn(rows, 20)))
        assert not chains
        model(torch.randn(40, 20))  # of which another kernel may be asked
        assert chains


def test_optimizers_may_move_numbers(chains: list[Any]) -> None:
    """``parameter.data`` becomes another memory at each step of some."""
    model = converted().train()
    for step in range(8):
        if step == 3:
            chains.clear()
        assert_trains_as_own_code(model, torch.randn(ROWS, 20))
        for parameter in model.parameters():
            parameter.data = parameter.data - 0.01
    assert not [chain for chain in chains if chain[0] in list(model.experts)]


def test_modes_may_alternate(chains: list[Any]) -> None:
    model, x = converted(), torch.randn(ROWS, 20)
    for turn in range(8):
        if turn == 3:
            chains.clear()
        assert_trains_as_own_code(model.train(), x)
        assert_as_own_code(model.eval(), x)
    assert not [chain for chain in chains if chain[0] in list(model.experts)]


def test_a_deepctr_level(chains: list[Any]) -> None:
    model, x = ple().eval(), features(5).float()
    assert mk.convert(model, force=True).replaced
    with torch.no_grad():
        found = [model(x) for _ in range(3)]
        chains.clear()
        found += [model(x) for _ in range(3)]
        assert not chains
        mk.revert(model)
        exact = model(x)
    for y in found:
        torch.testing.assert_close(y, exact)


def _frozen(model: Any, weight: nn.Parameter) -> None:
    weight.requires_grad_(False)


def _another_over_the_same_memory(model: Any, weight: nn.Parameter) -> None:
    first(model)[0].weight = nn.Parameter(weight.data)


def _heard(model: Any, weight: nn.Parameter) -> None:
    weight.register_hook(lambda gradient: 3 * gradient)


def _heard_behind(model: Any, weight: nn.Parameter) -> None:
    def enlarge(parameter: Tensor) -> None:
        parameter.grad.mul_(5)  # type: ignore[union-attr]

    weight.register_post_accumulate_grad_hook(enlarge)


@pytest.mark.parametrize("change", [_frozen, _another_over_the_same_memory, _heard, _heard_behind])
def test_what_gradients_depend_on(change: Callable[[Any, nn.Parameter], None]) -> None:
    model, x = converted(), torch.randn(ROWS, 20)
    for _ in range(4):
        before = gradients(model, x)
    assert readings(model)
    change(model, first(model)[0].weight)
    for _ in range(4):
        after = gradients(model, x)
        exact = gradients(model, x, own=True)
        for name, gradient in exact.items():
            assert (gradient is None) == (after[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(after[name], gradient, rtol=1e-3, atol=1e-2)
    if change is not _another_over_the_same_memory:
        name = "experts.0.0.weight"
        assert after[name] is None or not torch.allclose(after[name], before[name])  # type: ignore[arg-type]


def test_what_was_exchanged_goes_with_the_next_call() -> None:
    model = kept()
    old = weakref.ref(first(model)[0])
    replace_layer(model)
    serve(model, torch.ones(3, 20))
    gc.collect()
    assert old() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_was_exchanged_goes_with_calls_of_any_kind() -> None:
    model = converted().train()
    for _ in range(4):
        model(torch.randn(ROWS, 20))
    model.eval()
    for _ in range(4):
        serve(model, torch.ones(3, 20))
    assert len(readings(model)) == 2
    old = weakref.ref(first(model)[0])
    replace_layer(model)
    serve(model, torch.ones(3, 20))
    gc.collect()
    assert old() is None


def test_copies_keep_nothing() -> None:
    model, x = kept(), torch.randn(6, 20)
    expected = serve(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not readings(other)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(serve(other, x), expected, strict=True))
        assert readings(other)


def test_parameters_of_a_call() -> None:
    """Those of ``functional_call`` are other objects at each call: less and less often something is kept of them."""
    model, x = converted(), torch.randn(5, 20)
    plain = copy.deepcopy(model)
    mk.revert(plain)
    for _ in range(60):
        own = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        with torch.no_grad():
            found = torch.func.functional_call(model, own, (x,))
            exact = torch.func.functional_call(plain, own, (x,))
        for y, true in zip(found, exact, strict=True):
            torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-4)
    (place,) = vars(model)[CALLS].readings(0)._places.values()
    assert place.patience._wait >= 16


def test_parameters_that_were_computed() -> None:
    """As in meta-learning: what they were computed of is not held."""
    model, x = converted(), torch.randn(5, 20)
    own = {name: p * 1.5 for name, p in model.named_parameters()}
    for _ in range(6):
        torch.func.functional_call(model, own, (x,))
    assert not readings(model)
    gone = weakref.ref(own["experts.0.0.weight"])
    del own
    gc.collect()
    assert gone() is None


def test_more_kinds_of_calls_than_are_kept() -> None:
    reading = Readings()
    for key in range(40):
        assert reading.find(key, lambda: (), lambda: ["parts"], lambda found: ()) == ["parts"]
    assert len(reading._places) <= Readings._MOST


def test_threads_that_serve_and_exchange() -> None:
    model, x = kept(), torch.randn(6, 20)
    layers = [nn.Linear(20, 24) for _ in range(2)]
    exact = []
    for layer in layers:
        first(model)[0] = layer
        exact.append(serve(model, x)[0])
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(serve(model, x)[0] for _ in range(300))) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for layer in layers:
            first(model)._modules["0"] = layer
    for thread in threads:
        thread.join()
    assert len(found) == 900
    for y in found:
        assert any(torch.allclose(y, true, atol=1e-6) for true in exact)
    for _ in range(4):
        torch.testing.assert_close(serve(model, x)[0], exact[-1])


def test_what_is_exchanged_while_it_is_read() -> None:
    """Another layer is there while the level is read, and none before and after it."""
    modules: Any = [nn.Linear(20, 24), nn.Linear(20, 24)]
    reading, place = Readings(), [modules[0]]

    def read() -> Any:
        place[0] = modules[1]
        found = list(place)
        place[0] = modules[0]
        return found

    for _ in range(8):
        assert reading.find("key", lambda: list(place), read, iter) == [modules[1]]
    assert reading._places["key"].kept is None


class Bare(nn.Module):
    """Gates in one tensor, or matrices by themselves, whose slices and transposes are made anew for each call."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(20, 12), nn.ReLU()) for _ in range(3))
        gates = torch.randn(2, 20, 3)
        self.gates: Any = nn.Parameter(gates) if joined else nn.ParameterList(list(gates))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [((x @ gate).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


@pytest.mark.parametrize("joined", [False, True])
def test_tensors_without_modules(joined: bool) -> None:
    mk.convert.register(
        Bare,
        experts=lambda level: level.experts,
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(3, 2),
    )
    model = Bare(joined)
    assert mk.convert(model).replaced
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(8):
        x = torch.randn(ROWS, 20)
        for y, true in zip(model(x), Bare.forward(model, x), strict=True):
            torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(x)).backward()
        optimizer.step()
        if step == 5:
            with torch.no_grad():
                nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(model.parameters()), model.parameters())


def test_a_class_that_gets_a_forward_method() -> None:
    class Block(nn.Sequential):
        pass

    model, x = HiddenGates().eval(), torch.randn(6, 20)
    for e, expert in enumerate(model.experts):
        model.experts[e] = Block(*expert)  # type: ignore[misc]
    assert mk.convert(model).replaced
    for with_gradients in (True, False, True, False):
        with torch.set_grad_enabled(with_gradients):
            for _ in range(4):
                model(x)
    assert readings(model)
    Block.forward = lambda self, x: 2 * nn.Sequential.forward(self, x)  # type: ignore[method-assign]
    for _ in range(4):
        assert_as_own_code(model, x)


def test_a_dictionary_that_holds_itself() -> None:
    model: Any = converted()
    first(model)[0].notes = {}
    first(model)[0].notes["self"] = first(model)[0].notes
    for _ in range(6):
        assert_as_own_code(model, torch.randn(6, 20))
    assert not readings(model)


@pytest.mark.parametrize("serves", [False, True])
def test_a_class_that_leads_back_to_the_model(serves: bool) -> None:
    def made() -> Any:
        held: dict[str, Any] = {"scale": 2.0}

        class Scaled(nn.ReLU):
            def extra(self) -> Any:
                return held

        class Own(HiddenGates):
            def extra(self) -> Any:
                return held

        model = HiddenGates().eval()
        model.__class__ = Own
        for expert in model.experts:
            expert.append(Scaled())  # type: ignore[operator]
        held["model"] = model
        mk.convert(model)
        for _ in range(6):
            with torch.set_grad_enabled(not serves):
                model(torch.randn(ROWS, 20))
        return weakref.ref(model)

    gone = [made() for _ in range(4)]
    gc.collect()
    assert [ref() for ref in gone[:-1]] == [None] * 3
