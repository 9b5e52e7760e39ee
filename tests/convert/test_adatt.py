"""AdaTT's models, registered: several levels in one forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels._convert import registry
from tests.convert import adatt
from tests.convert.agreement import assert_converts
from tests.convert.models import fill
from tests.ops.agreement import assert_as_exact

WIDTH, TASKS = 10, 3
UNITS = ((12, 7), (9,), (8, 6))

# A model, the streams of its input (0: it takes [B, D]), and the experts of each fused call.
MODELS: dict[str, tuple[Callable[[], Any], int, list[int]]] = {
    "MLMMoE": (lambda: adatt.MLMMoE(WIDTH, UNITS, ((), (), ()), TASKS, 4), 0, [4, 4, 4]),
    "MLMMoE with hidden layers in its gates": (
        lambda: adatt.MLMMoE(WIDTH, UNITS, ((5,), (), (6, 4)), TASKS, 4),
        0,
        [4, 4, 4],
    ),
    "MLMMoE of one level": (lambda: adatt.MLMMoE(WIDTH, UNITS[:1], ((),), TASKS, 4), 0, [4]),
    "PLE": (lambda: adatt.PLE(WIDTH, UNITS, TASKS, 2, 2), TASKS + 1, [8, 8, 8]),
    "PLE with a number of experts a task": (lambda: adatt.PLE(WIDTH, UNITS, TASKS, [1, 3, 2], 1), TASKS + 1, [7, 7, 7]),
    "AdaTTSp": (lambda: adatt.AdaTTSp(WIDTH, UNITS, TASKS, 2), TASKS, [6, 6, 6]),
    "AdaTTSp of one expert a task": (lambda: adatt.AdaTTSp(WIDTH, UNITS, TASKS, 1), TASKS, [3, 3, 3]),
    "AdaTTSp without its residual": (
        lambda: adatt.AdaTTSp(WIDTH, UNITS, TASKS, 2, self_exp_res_connect=False),
        TASKS,
        [6, 6, 6],
    ),
    "AdaTTWSharedExps": (lambda: adatt.AdaTTWSharedExps(WIDTH, UNITS, TASKS, (1, 2, 1), 2), TASKS + 1, [6, 6, 6]),
    "AdaTTWSharedExps of one expert each": (
        lambda: adatt.AdaTTWSharedExps(WIDTH, UNITS, TASKS, (1, 1, 1), 1),
        TASKS + 1,
        [4, 4, 4],
    ),
    "AdaTTWSharedExps without its residual": (
        lambda: adatt.AdaTTWSharedExps(WIDTH, UNITS, TASKS, (1, 2, 1), 2, self_exp_res_connect=False),
        TASKS + 1,
        [6, 6, 6],
    ),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AdaTT's classes are known in these tests only."""
    monkeypatch.setattr(registry, "_registered", {})
    for kind, description in adatt.DESCRIPTIONS.items():
        mk.convert.register(kind, **description)
    yield


def inputs(streams: int) -> Callable[[int, int, torch.dtype], tuple[Any, ...]]:
    def made(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        shape = (rows, streams, WIDTH) if streams else (rows, WIDTH)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),)

    return made


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("name", MODELS)
def test_trains_and_serves_as_the_library(name: str, rows: int, fused_calls: list[int]) -> None:
    make, streams, experts = MODELS[name]
    report = assert_converts(fill(make()), inputs(streams), rows)
    assert len(report.replaced) == len(experts)
    model = make().eval()
    mk.convert(model)
    fused_calls.clear()
    with torch.no_grad():
        model(*inputs(streams)(1, 0, torch.float32))
    assert fused_calls == experts


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_input(name: str) -> None:
    make, streams, _ = MODELS[name]
    model = fill(make()).double()
    converted = copy.deepcopy(model)
    mk.convert(converted)
    (x,) = inputs(streams)(9, 0, torch.float64)
    found = []
    for one in (model, converted):
        own = x.clone().requires_grad_()
        one(own).square().sum().backward()
        found.append(own.grad)
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["MLMMoE", "PLE", "AdaTTSp"])
def test_copies_pickles_and_reverts(name: str) -> None:
    make, streams, _ = MODELS[name]
    model = fill(make()).eval()
    x = inputs(streams)(9, 0, torch.float32)
    expected, kind = model(*x), type(model)
    mk.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) is not kind
        torch.testing.assert_close(other(*x), expected)
    mk.revert(model)
    assert type(model) is kind


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph() -> None:
    make, streams, _ = MODELS["AdaTTSp"]
    model = fill(make())
    converted = copy.deepcopy(model)
    mk.convert(converted)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    x = inputs(streams)(9, 0, torch.float32)
    torch.testing.assert_close(compiled(*x), model(*x))
    exact = copy.deepcopy(model).double()
    compiled(*x).sum().backward()
    model(*x).sum().backward()
    exact(*(stream.double() for stream in x)).sum().backward()
    assert_as_exact(*([p.grad for p in m.parameters()] for m in (converted, exact, model)))


def without_residual(model: Any, i: int, mixed: Any, streams: Any) -> list[Any]:
    return list(mixed[: model.num_tasks])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("AdaTTSp", {"level_outputs": without_residual}),
        ("MLMMoE", {"gate_inputs": lambda model, i: range(len(model.gates[i]))}),
        ("PLE", {"experts": lambda model, i: list(reversed(adatt.nets(model, i)))}),
    ],
)
def test_a_wrong_description_is_found_out(name: str, changes: dict[str, Any]) -> None:
    model = fill(MODELS[name][0]())
    mk.convert.register(type(model), **{**adatt.DESCRIPTIONS[type(model)], **changes})
    (line,) = mk.convert(model).left_alone
    assert "its outputs differ from those of its experts and gates" in line.detail or "shapes" in line.detail
