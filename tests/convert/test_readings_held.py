"""What is read of a level and kept: how long it is held, by which threads, and of which models nothing is."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._convert.calls import CALLS, Readings
from tests.convert.changes import assert_as_own_code, assert_copies_keep_nothing, first, register, replace_layer, serve
from tests.convert.hidden_gates import ROWS, HiddenGates, converted, kept, readings

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register(HiddenGates)


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
    old = weakref.ref(first(model)[0].weight)
    replace_layer(model)
    serve(model, torch.ones(3, 20))
    gc.collect()
    assert old() is None


def call(model: Any, mode: str) -> None:
    with torch.set_grad_enabled(mode != "serving"):
        model.train(mode == "training")(torch.randn(ROWS, 20))


def load(model: Any) -> None:
    """As the best checkpoint of a training."""
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


MODES = ("serving", "training", "evaluation with gradients")


@pytest.mark.parametrize("exchange", [replace_layer, load])
@pytest.mark.parametrize("before, after", [(a, b) for a in MODES for b in MODES if a != b])
def test_what_was_exchanged_goes_where_calls_are_of_another_kind(before: str, after: str, exchange: Any) -> None:
    """And none of the kind that there was before comes any more."""
    model = converted()
    for _ in range(4):
        call(model, before)
    assert len(readings(model)) == 1
    old = weakref.ref(first(model)[0].weight)
    exchange(model)
    call(model, after)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("is_read", [False, True])
def test_all_kinds_of_calls_drop_what_was_exchanged(is_read: bool) -> None:
    """One that comes no more would hold it for good; also where the module's own code has to run by now."""
    reading, roots = Readings(), [nn.Linear(2, 2)]
    for key in ("training", "serving"):
        for _ in range(4):
            reading.find(key, lambda: list(roots), lambda: list(roots), iter)
    assert all(place.kept is not None for place in reading._places.values())
    old, roots[0] = weakref.ref(roots[0]), nn.Linear(2, 2)
    reading.find("serving", lambda: list(roots), lambda: list(roots) if is_read else "a reason", iter)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_parameter_that_gets_a_hook(hook: str) -> None:
    """The level is read again, which refuses it, so that nothing is kept."""
    model, x = converted().train(), torch.randn(ROWS, 20)
    for _ in range(4):
        model(x)
    assert len(readings(model)) == 1

    def listen(tensor: Tensor) -> None:
        pass

    getattr(first(model)[0].weight, hook)(listen)
    for _ in range(4):
        model(x)
    assert not readings(model)


def test_copies_keep_nothing() -> None:
    assert_copies_keep_nothing(kept(), readings)


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


class Wired(nn.Module):
    """Gates of which each reads the stream that a buffer names."""

    streams: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(20, 12), nn.ReLU()) for _ in range(2))
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(dim=1)) for _ in range(2)
        )
        self.register_buffer("streams", torch.tensor([0, 1]))

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert, x in zip(self.experts, streams, strict=True)], dim=1)
        read = [streams[i] for i in self.streams.tolist()]
        return [(gate(x).unsqueeze(2) * hidden).sum(1) for gate, x in zip(self.gates, read, strict=True)]


@pytest.mark.parametrize("serves", [False, True])
def test_gates_that_get_another_stream(serves: bool) -> None:
    mk.convert.register(
        Wired,
        experts=lambda level: level.experts,
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing([0, 1], [[0, 1], [0, 1]]),
        gate_inputs=lambda level: level.streams.tolist(),
    )
    model = Wired().eval()
    assert mk.convert(model).replaced
    x = [torch.randn(ROWS, 20) for _ in range(2)]
    with torch.set_grad_enabled(not serves):
        for wiring in ([0, 1], [1, 0], [1, 1]):
            model.streams.copy_(torch.tensor(wiring))
            for _ in range(4):
                for y, true in zip(model(x), Wired.forward(model, x), strict=True):
                    torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-4)


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
