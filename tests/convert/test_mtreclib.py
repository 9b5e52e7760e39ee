"""MTReclib's whole models, known by their structure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert import doubles
from tests.convert.agreement import assert_converts
from tests.convert.models import fill

MODELS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "PLE": (lambda: fill(doubles.PLEModel()), [8, 8]),
    "PLE of one level": (lambda: fill(doubles.PLEModel((9,), shared=3, specific=1)), [6]),
    "PLE of three levels": (lambda: fill(doubles.PLEModel((9, 8, 7), tasks=2)), [6, 6, 6]),
    "MMoE": (lambda: fill(doubles.MMoEModel()), [4]),
}


def inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 9, (rows, doubles.RecModel.FIELDS), generator=generator)
    return codes, torch.randn(rows, doubles.RecModel.NUMBERS, generator=generator).to(dtype)


@pytest.mark.parametrize("rows", [60, 300])
@pytest.mark.parametrize("name", MODELS)
def test_trains_and_serves_as_the_library(name: str, rows: int, fused_calls: list[int]) -> None:
    make, calls = MODELS[name]
    report = assert_converts(make(), inputs, rows)
    assert len(report.replaced) == len(calls)
    assert report.replaced[0].detail.startswith(f"{calls[0]} experts of ")
    model = make().eval()
    mk.convert(model)
    fused_calls.clear()
    with torch.no_grad():
        model(*inputs(3, 0, torch.float32))
    assert fused_calls == calls


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_reverts(name: str) -> None:
    model = MODELS[name][0]().eval()
    x = inputs(9, 0, torch.float32)
    expected = model(*x)
    kind = type(model)
    mk.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) is not kind
        torch.testing.assert_close(other(*x), expected)
    mk.revert(model)
    assert type(model) is kind


@torch.no_grad()
def test_a_hook_that_comes_later_is_called() -> None:
    model = MODELS["PLE"][0]().eval()
    mk.convert(model)
    seen: list[Tensor] = []
    model.task_experts[1][0][1].mlp[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(*inputs(9, 0, torch.float32))
    assert len(seen) == 1


class SharedFirst(doubles.MMoEModel):
    """A copy of the library with another order of experts."""

    forward = doubles.RecModel.forward

    def trunk(self, x: Tensor) -> list[Tensor]:
        return [doubles.mixed(gate(x), [expert(x) for expert in reversed(self.expert)]) for gate in self.gate]


SharedFirst.__name__ = "MMoEModel"


def own_forward(model: Any) -> Any:
    model.forward = model.forward
    return model


def without_gates(model: Any) -> Any:
    model.gate = nn.ModuleList()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (SharedFirst, "in evaluation its outputs differ from those of its experts and gates"),
        (lambda: own_forward(doubles.PLEModel()), "its forward is not that of PLEModel"),
        (lambda: without_gates(doubles.MMoEModel()), "its description does not fit: ValueError: num_tasks must be"),
    ],
)
def test_left_alone(make: Any, reason: str) -> None:
    (line,) = mk.convert(make()).left_alone
    assert line.detail.startswith(reason)
