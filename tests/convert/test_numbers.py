"""A converted model computes what the library computes: in training, step by step, and in serving."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests.convert.agreement import assert_converts
from tests.convert.models import features, mmoe, ple
from tests.ops.agreement import assert_as_exact

MODELS: dict[str, Any] = {
    "PLE of one level": lambda: ple(num_levels=1),
    "PLE of two levels": lambda: ple(l2_reg_dnn=1e-3, task_types=("binary", "regression", "binary")),
    "PLE of three levels, two tasks": lambda: ple(num_levels=3, task_names=("a", "b")),
    "PLE with gates of one layer": lambda: ple(gate_dnn_hidden_units=(), specific_expert_num=3),
    "PLE with fewer shared experts": lambda: ple(specific_expert_num=3, shared_expert_num=1),
    "PLE with experts of one layer": lambda: ple(expert_dnn_hidden_units=(8,), gate_dnn_hidden_units=(9, 4)),
    "PLE without towers": lambda: ple(tower_dnn_hidden_units=(), dnn_activation="sigmoid"),
    "PLE without activations": lambda: ple(dnn_activation="linear"),
    "PLE with SiLU": lambda: ple(dnn_activation=torch.nn.SiLU),
    "MMOE": lambda: mmoe(l2_reg_dnn=1e-3),
    "MMOE of regressions": lambda: mmoe(task_names=("a", "b"), task_types=("regression",) * 2, num_experts=2),
    "MMOE with gates of one layer": lambda: mmoe(gate_dnn_hidden_units=(), tower_dnn_hidden_units=()),
    "MMOE with experts of one layer": lambda: mmoe(expert_dnn_hidden_units=(8,), dnn_activation=torch.nn.GELU),
}


def inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor]:
    return (features(rows, seed).to(dtype),)


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_library(name: str) -> None:
    assert not assert_converts(MODELS[name](), inputs, rows=50, serve=(1, 33)).left_alone


def test_float64_agrees_to_float64() -> None:
    model = ple().double()
    x = features(20)
    expected = model(x)
    mk.convert(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make", [ple, mmoe])
def test_autocast(make: Any) -> None:
    model = make()
    x = features(20).float()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        mk.convert(model)
        found = model(x)
    assert_as_exact(found, exact, expected)
    found.float().sum().backward()
    assert model.embedding_dict["s0"].weight.grad.abs().sum() > 0


def test_serving_empty_batches() -> None:
    model = mmoe()
    mk.convert(model)
    assert model(features(0).float()).shape == (0, 3)


@pytest.mark.parametrize("make", [ple, mmoe])
def test_the_librarys_own_fit(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    x = features(64).numpy()
    inputs = {name: x[:, start] for name, (start, _) in make().feature_index.items()}
    labels = (x[:, -3:] > 0).astype("float32")
    predictions = []
    for convert in (False, True):
        model = make(l2_reg_dnn=1e-4)
        if convert:
            assert mk.convert(model).replaced
        model.compile("adam", loss=["binary_crossentropy"] * 3)
        model.fit(dict(inputs), labels, batch_size=16, epochs=2, verbose=0, shuffle=False)
        predictions.append(model.predict(dict(inputs), batch_size=64))
    # Probabilities after eight steps; agreement.py has the budget of training.
    torch.testing.assert_close(*map(torch.from_numpy, predictions), rtol=1e-5, atol=1e-5)
