"""The runtimes of the suite serving get the shape of their inputs, from a file that is exported once."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from benchmarks.serving.contenders import CONTENDERS, RUNTIMES, Load
from benchmarks.serving.models import MODELS, Model

FEATURES = 3


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the weights that were exported; no export is made."""
    found: list[torch.dtype] = []

    def export(source: nn.Module, inputs: Any, **options: Any) -> Any:
        found.append(next(source.parameters()).dtype)
        return SimpleNamespace(model_proto=SimpleNamespace(SerializeToString=lambda: b"a file"))

    monkeypatch.setattr(torch.onnx, "export", export)
    return found


@pytest.fixture
def model() -> Model:
    return dataclasses.replace(
        MODELS["level"], modules=lambda: nn.Linear(FEATURES, 1), rows=lambda rows: torch.zeros(rows, FEATURES)
    )


def test_onnxruntime_is_told_the_rows(
    model: Model, exports: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = MagicMock()
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    for rows in (1, 16):
        CONTENDERS["onnxruntime"].make(model, model.modules(), model.rows(rows), Load(1))
        runtime.SessionOptions().add_free_dimension_override_by_name.assert_called_with("rows", rows)
        assert runtime.InferenceSession.call_args.args == (b"a file", runtime.SessionOptions())
    assert exports == [torch.float32]


@pytest.mark.parametrize(("weights", "hint"), [(torch.float32, "f32"), (torch.bfloat16, "bf16")])
def test_openvino_is_given_its_shape(
    weights: torch.dtype, hint: str, model: Model, exports: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = MagicMock()
    monkeypatch.setitem(sys.modules, "openvino", runtime)
    core = runtime.Core()
    for rows in (1, 16):
        order = MagicMock()
        core.read_model, core.compile_model = order.read, order.compile
        CONTENDERS["openvino"].make(model, model.modules().to(weights), model.rows(rows).to(weights), Load(1, 2))
        network = order.read.return_value
        assert [name for name, *_ in order.mock_calls] == ["read", "read().reshape", "compile"]
        network.reshape.assert_called_once_with([rows, FEATURES])
        assert order.read.call_args.args == (b"a file",) and order.compile.call_args.args[0] is network
        assert order.compile.call_args.args[2]["INFERENCE_PRECISION_HINT"] == hint
    assert exports == [torch.float32]  # whatever it multiplies in


def test_no_runtime_serves_shapes_that_it_does_not_know() -> None:
    assert all(CONTENDERS[name].static for name in RUNTIMES)
