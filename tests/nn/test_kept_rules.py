"""Calls of trunks that must not be served by what is kept, and how long a trunk waits until it keeps one again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import mtlkernels as mk
from mtlkernels import _backends, _dumps, _extension
from mtlkernels.nn._arguments import Style
from mtlkernels.nn.level import TrunkLevel
from tests import requires
from tests.nn.serving import kept, serve

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Any] = {
    "PLE": lambda **options: mk.nn.PLE(8, 2, (8, 6), num_specific=1, num_shared=1, num_levels=2, **options),
    "CGC": lambda **options: mk.nn.CGC(8, 2, (8, 6), num_specific=1, num_shared=1, **options),
    "MMoE": lambda **options: mk.nn.MMoE(8, 2, (8, 6), 3, **options),
}


@pytest.mark.parametrize("kind", KINDS)
def test_monte_carlo_dropout(kind: str) -> None:
    """In training mode without gradients other values are dropped at each call."""
    model = KINDS[kind](dropout=0.5).train()
    x = X.repeat(10, 1)
    with torch.no_grad():
        found = [model(x)[0] for _ in range(12)]
    assert not any(map(torch.equal, found, found[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_level_in_training_mode_behind_kept_calls(kind: str) -> None:
    prepared = mk.prepare(KINDS[kind]())
    with torch.no_grad():
        for _ in range(6):
            prepared(X)
        level = prepared.levels[1] if kind == "PLE" else prepared.level
        level.train()
        with pytest.raises(RuntimeError, match="serves only"):
            prepared(X)


@pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("asked", ["reference", None])
def test_calls_that_are_to_enter_an_implementation(
    asked: str | None, batch_norm: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that is asked for by name; and any, where calls that fail are saved."""
    model, entered, found = kept("MMoE", batch_norm=batch_norm), [], _backends._found
    monkeypatch.setattr(_backends, "_found", lambda *args: entered.append(args[2]) or found(*args))
    if asked is None:
        monkeypatch.setattr(_dumps, "folder", tmp_path / "dumps")
    with nullcontext() if asked is None else mk.use_backend(asked):
        serve(model, torch.randn(3, 20))
    assert entered == [asked]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("streams, gates", [((0, 0, 1), ((1, 2), (0, 1))), ((1, 0, 1), ((0, 1), (1, 2)))])
def test_another_routing(streams: Any, gates: Any, batch_norm: bool) -> None:
    """Of other gates, or of other streams alone."""
    style = Style("relu", batch_norm, 0.0, None, None)

    def level_of(routing: mk.Routing) -> TrunkLevel:
        return TrunkLevel(8, (8,), (), routing, (0, 1), style).eval()

    level, x = level_of(mk.Routing((0, 0, 1), ((0, 1), (1, 2)))), [X, X.flip(0)]
    with torch.no_grad():
        before = [level(x) for _ in range(6)][-1]
        level.routing = mk.Routing(streams, gates)
        fresh = level_of(level.routing)
        fresh.load_state_dict(level.state_dict())
        found, expected = level(x), fresh(x)
    assert not torch.equal(before[0], expected[0])
    torch.testing.assert_close(found, expected)


@requires.cpp_kernels
def test_a_default_device_does_not_look_on() -> None:
    """It is a mode of PyTorch's like those that do."""
    model = KINDS["MMoE"]()
    with torch.no_grad(), torch.device("cpu"):
        for _ in range(4):
            model(X)
        assert model.level.served(X) is not None


class Looks(TorchFunctionMode):
    """Whoever notes the functions that are called."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")
@pytest.mark.parametrize("beside", [nullcontext, lambda: torch.device("cpu")], ids=["alone", "default device"])
def test_a_mode_of_functions_looks_on(beside: Any) -> None:
    """Behind calls that are kept; it gets to see what computes the level."""
    model, x = kept("MMoE"), torch.randn(3, 20)
    before = serve(model, x)
    with beside(), Looks() as mode:
        found = serve(model, x)
    assert mode.seen
    for y, expected in zip(found, before, strict=True):
        torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # what PyTorch has for tangents in place
@pytest.mark.parametrize("batch_norm", [False, True])
def test_tangents_of_a_parameter(batch_norm: bool) -> None:
    """Which it gets in place, behind calls without."""
    model = KINDS["MMoE"](batch_norm=batch_norm).eval()
    weight = model.level.experts[0].linears[0].weight

    def tangent(call: Any) -> Any:
        with torch.no_grad(), forward_ad.dual_level():
            weight.copy_(forward_ad.make_dual(weight.clone(), torch.rand_like(weight)))
            return forward_ad.unpack_dual(call()[0]).tangent

    with torch.no_grad():
        for _ in range(5):
            model(X)
    torch.manual_seed(0)
    found = tangent(lambda: model(X))
    torch.manual_seed(0)
    torch.testing.assert_close(found, tangent(lambda: model.level._by_modules([X])))


def _wait(model: Any, calls: int, every: int) -> int:
    """How long a level waits behind so many calls, of each so many of which something changes."""
    with torch.no_grad():
        for i in range(calls):
            if i % every == 0:
                for expert in model.level.experts:
                    expert.linears[0].weight = nn.Parameter(expert.linears[0].weight.detach().clone())
            model(X)
    return int(model.level._calls._patience._wait)


@requires.cpp_kernels
@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_has_served_long_is_soon_kept_again(batch_norm: bool) -> None:
    model = KINDS["MMoE"](batch_norm=batch_norm).eval()
    assert _wait(model, 400, 4) >= 8
    assert _wait(model, 10001, 10000) == 1
    assert _wait(model, 9000, 4) <= 1024


@requires.cpp_kernels
def test_what_cannot_be_kept_is_tried_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried, function = KINDS["MMoE"]().eval(), [], _extension.function

    def without_keeping(name: str) -> Any:
        return (lambda *_: tried.append(name)) if name == "keep_trunk" else function(name)

    monkeypatch.setattr(_extension, "function", without_keeping)
    with torch.no_grad():
        for _ in range(200):
            model(X)
    assert 0 < len(tried) < 12
