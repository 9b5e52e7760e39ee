"""``torch.onnx.export``, old and new: ONNX Runtime gives the model's numbers, for other rows too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from tests.convert import models
from tests.ways_out.kinds import ALL, Kind, assert_same

reason = "onnx, onnxscript and onnxruntime belong to the extra 'test'"
onnx = pytest.importorskip("onnx", reason=reason)
pytest.importorskip("onnxscript", reason=reason)
onnxruntime = pytest.importorskip("onnxruntime", reason=reason)

# The exporters' own: deprecations of the old one, and what the new one says of itself and of what it calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx"),
]

# One exporter run takes seconds: of what is alike, one.
NEW = [
    "deepctr PLE",
    "rechub PLE",
    "PLE with batch norm",
    "expert_mixture with norms",
    "SNR Trans",
]


def computed(path: Path, *feeds: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    results = session.run(None, {name: feed.numpy() for name, feed in zip(names, feeds, strict=True)})
    return [torch.from_numpy(result) for result in results]


def check(path: Path, model: Any, kind: Kind) -> None:
    domains = {node.domain for node in onnx.load(str(path)).graph.node}
    assert domains <= {"", "ai.onnx", "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common"}
    for count in (1, 3, 40):
        x = kind.inputs(count, count)
        assert_same(computed(path, *x), model(*x), f"{count} rows")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ALL)
def test_old_exporter(name: str, grad: bool, tmp_path: Path) -> None:
    kind, path = ALL[name], tmp_path / "model.onnx"
    model = kind.model()
    with torch.set_grad_enabled(grad):
        options: Any = {"input_names": ["x"], "dynamic_axes": {"x": {0: "rows"}}, "dynamo": False}
        torch.onnx.export(model, kind.inputs(5, 0), path, **options)
    check(path, model, kind)


@pytest.mark.parametrize("name", NEW)
def test_new_exporter(name: str, tmp_path: Path) -> None:
    kind, path = ALL[name], tmp_path / "model.onnx"
    model = kind.model()
    rows = torch.export.Dim("rows", min=1)
    torch.onnx.export(model, kind.inputs(5, 0), path, dynamo=True, dynamic_shapes=({0: rows},), verbose=False)
    check(path, model, kind)


def test_of_an_exported_program(tmp_path: Path) -> None:
    """What torch.export was given under use_backend("reference") is plain, and so is its ONNX."""
    kind, path = ALL["PLE"], tmp_path / "model.onnx"
    model = kind.model()
    with mk.use_backend("reference"):
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(model, kind.inputs(5, 0), dynamic_shapes=({0: rows},))
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    x = kind.inputs(40, 1)
    assert_same(computed(path, *x), model(*x))


@pytest.mark.parametrize("dynamo", [None, False], ids=["default", "old"])
def test_export_of_rechubs_trainer(dynamo: bool | None, tmp_path: Path) -> None:
    from torch_rechub.trainers import MTLTrainer

    model = models.rechub_ple().float().eval()
    assert mk.convert(model).replaced
    trainer = MTLTrainer(model, ["classification"] * 3, model_path=str(tmp_path))
    path = tmp_path / "model.onnx"
    options = None if dynamo is None else {"dynamo": dynamo}
    assert trainer.export_onnx(str(path), onnx_export_kwargs=options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3, 40):
        given = models.by_name(models.features(count, count).float())
        # The library's own example has a column for each number.
        feeds = {x.name: given[x.name].numpy().reshape(count, *[1] * (len(x.shape) - 1)) for x in session.get_inputs()}
        (found,) = session.run(None, feeds)
        model.eval()
        assert_same(torch.from_numpy(found), model(given), f"{count} rows")
