"""Where no kernels serve a model's device, it goes on by its own code; whoever insists gets fused evaluation.

Absence is simulated where the package looks: ``_extension._cpp`` are the C++ kernels, ``_backends.has_triton``
tells of Triton. The last test is of an install that has neither.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _backends, _extension
from mtlkernels._convert import registry
from mtlkernels._convert.paying import pays
from tests import requires
from tests.convert import doubles
from tests.convert.models import by_name, features, fill, mmoe, ple, rechub_mmoe, rechub_ple

ROWS = 20
FAST = _backends.fast  # before tests/conftest.py exchanges it in an install without kernels
KEPT = {"float32": torch.float32, "float64": torch.float64}


class Own(nn.Module):
    """A registered class."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU()) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return features(ROWS).to(dtype)


def reclib_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 9, (ROWS, doubles.RecModel.FIELDS), generator=generator)
    return codes, torch.randn(ROWS, doubles.RecModel.NUMBERS, generator=generator)


# A model, its arguments, and how many levels it has.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
    "deepctr-torch's PLE": (ple, lambda: (rows(),), 2),
    "deepctr-torch's MMOE": (mmoe, lambda: (rows(),), 1),
    "torch-rechub's PLE": (rechub_ple, lambda: (by_name(rows()),), 2),
    "torch-rechub's MMOE": (rechub_mmoe, lambda: (by_name(rows()),), 1),
    "MTReclib's PLEModel": (lambda: fill(doubles.PLEModel()), reclib_inputs, 2),
    "FuxiCTR's MMoE_Layer": (lambda: fill(doubles.MMoE_Layer(10, (8,))), lambda: (torch.ones(ROWS, 10),), 1),
    "a registered class": (lambda: fill(Own()), lambda: (torch.ones(ROWS, 6),), 1),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    mk.convert.register(
        Own,
        experts=lambda level: level.experts,
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(len(level.experts), len(level.gates)),
    )


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the kernels away."""

    def take() -> None:
        monkeypatch.setattr(_backends, "fast", FAST)
        monkeypatch.setattr(_backends, "has_triton", lambda: False)
        monkeypatch.setattr(_backends, "has_cuda", lambda op: False)
        monkeypatch.setattr(_extension, "_cpp", _extension._Loaded(error="no such file"))

    return take


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def run(model: Any, arguments: Callable[[], Any]) -> list[Tensor]:
    """What the model serves; with gradients, levels with batch norm run their own code on so few rows anyway."""
    return leaves(model(*arguments()))


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for leaf in result if leaf is not None]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_left_alone(name: str, lose: Any, fused_calls: list[int]) -> None:
    make, arguments, levels = MODELS[name]
    lose()
    model = make().eval()
    kinds, expected = [type(m) for m in model.modules()], run(model, arguments)
    report = mk.convert(model)
    assert not report.replaced
    assert len(report.left_alone) == levels
    for line in report.left_alone:
        assert line.detail.startswith("fused it would be slower on 'cpu': ")
        assert "pip install --no-build-isolation" in line.detail
        assert line.detail.endswith("mk.convert(model, force=True) converts it all the same")
    assert len({line.part + line.path for line in report.left_alone}) == levels
    assert [type(m) for m in model.modules()] == kinds
    assert not any(name.startswith("_mtlkernels") for m in model.modules() for name in vars(m))
    fused_calls.clear()  # those of trials
    assert_same(run(model, arguments), expected)
    assert fused_calls == []


@pytest.mark.parametrize("name", MODELS)
def test_forced_it_is_fused_and_stays_so(name: str, lose: Any, fused_calls: list[int]) -> None:
    make, arguments, levels = MODELS[name]
    lose()
    model = make().eval()
    expected = run(model, arguments)
    assert len(mk.convert(model, force=True).replaced) == levels
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False))
    for other in (model, *copies):
        fused_calls.clear()
        torch.testing.assert_close(run(other, arguments), expected)
        assert len(fused_calls) == levels
    mk.revert(model)
    assert not any(name.startswith("_mtlkernels") for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_without_kernels_runs_its_own_code(name: str, lose: Any, fused_calls: list[int]) -> None:
    """As it is moved to a device that has none, or loaded in an install without."""
    make, arguments, levels = MODELS[name]
    model = make().eval()
    expected = run(model, arguments)
    assert len(mk.convert(model).replaced) == levels
    lose()
    fused_calls.clear()
    assert_same(run(model, arguments), expected)
    assert fused_calls == []
    with mk.use_backend("reference"):  # by name it is wanted
        torch.testing.assert_close(run(model, arguments), expected)
    assert len(fused_calls) == levels
    fused_calls.clear()
    (line, *_) = mk.convert(model, force=True).left_alone
    assert line.detail == "already converted, forced from now on"
    run(model, arguments)
    assert len(fused_calls) == levels


def test_a_backend_that_is_asked_for_by_name_converts(lose: Any) -> None:
    lose()
    with mk.use_backend("reference"):
        assert mk.convert(Own()).replaced


def test_an_implementation_that_is_missing_is_still_an_error(lose: Any) -> None:
    model = Own()
    mk.convert(model)
    lose()
    with mk.use_backend("cpp"), pytest.raises(RuntimeError, match="has no 'cpp' implementation"):
        model(torch.ones(ROWS, 6))


def test_the_devices_of_a_models_parts_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for "meta" alone, as if it were a device that has some beside a CPU that has none."""
    monkeypatch.setattr(_extension, "_cpp", _extension._Loaded(error="no such file"))
    monkeypatch.setattr(_backends, "fast", lambda op, device, dtype: device == "meta")
    report = mk.convert(nn.ModuleList([Own(), Own().to("meta")]))
    assert [line.path for line in report.left_alone] == ["0"]
    assert [line.path for line in report.replaced] == ["1"]


@requires.cpp_kernels
def test_on_meta_a_model_is_converted(fused_calls: list[int]) -> None:
    model = Own().to("meta")
    assert mk.convert(model).replaced
    assert [y.shape for y in model(torch.ones(ROWS, 6, device="meta"))] == [(ROWS, 5)] * 2
    fill(model.to_empty(device="cpu"))
    fused_calls.clear()
    model(torch.ones(ROWS, 6))
    assert fused_calls == [3]


def test_on_meta_without_any_kernels_it_is_left_alone(lose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lose()
    (line,) = mk.convert(Own().to("meta")).left_alone
    assert "there are no kernels for any device" in line.detail
    assert "pip install triton" in line.detail and "--no-build-isolation" in line.detail
    monkeypatch.setattr(_backends, "has_triton", lambda: True)
    assert mk.convert(Own().to("meta")).replaced


@pytest.mark.parametrize("kernels", [True, False])
def test_what_is_fast(kernels: bool, lose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lose()
    if kernels:
        monkeypatch.setattr(_extension, "_cpp", _extension._Loaded(Path("libmtlkernels.so")))
        monkeypatch.setattr(_backends, "_without_cpp", set())
        monkeypatch.setattr(_backends, "has_triton", lambda: True)
    places = [(device, dtype) for device in ("cpu", "cuda", "meta", "mps", "xpu") for dtype in KEPT.values()]
    fast = {place for place in places if _backends.fast("level", *place)}
    assert fast == ({*places[:3], *places[4:6]} if kernels else set())
    assert _backends.fast("pcgrad", "cuda", torch.float64) == kernels


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_on_another_device(device: str, lose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is said to be there stands for one: no such device is needed to decide."""
    monkeypatch.setattr(_backends, "fast", FAST)
    model: Any = Own()
    mk.convert(model, force=True)
    model._mtlkernels_force = False
    there: Any = SimpleNamespace(is_cpu=False, device=torch.device(device))
    for triton in (True, False):
        monkeypatch.setattr(_backends, "has_triton", lambda found=triton: found)
        for dtype in KEPT.values():
            assert pays(model.to(dtype), there) == (triton and device == "cuda" and dtype == torch.float32)
    model._mtlkernels_force = True
    assert pays(model, there)


def test_the_reason_on_a_gpu(lose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlkernels import _diagnosis

    lose()
    assert "pip install triton" in _diagnosis.no_kernels("cuda", torch.float32)
    assert "'mps'" in _diagnosis.no_kernels("mps", torch.float32)
    monkeypatch.setattr(_backends, "has_triton", lambda: True)
    assert "torch.float64" in _diagnosis.no_kernels("cuda", torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (line,) = mk.convert(Own()).left_alone
    assert "there are kernels for its GPU, so convert the model there" in line.detail


def test_a_wrong_model_is_found_out_without_kernels_too(lose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial runs fused on a CPU, of which a model on a GPU may have no kernels."""

    class PLEModel(doubles.PLEModel):
        def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
            return [1 - y for y in super().forward(categorical_x, numerical_x)]

    lose()
    (line,) = mk.convert(fill(PLEModel()), force=True).left_alone
    assert "in evaluation its outputs differ" in line.detail


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiles_without_kernels(lose: Any, fresh_compiler: None, fused_calls: list[int]) -> None:
    model = fill(Own())
    mk.convert(model)
    lose()
    fused_calls.clear()
    x = torch.ones(ROWS, 6)
    found = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert_same(found, model(x))
    assert fused_calls == []


@pytest.mark.parametrize("force", [1, None, "yes"])
def test_force_is_a_bool(force: Any) -> None:
    with pytest.raises(TypeError, match=f"force must be a bool, got {type(force).__name__}"):
        mk.convert(Own(), force=force)


def test_an_install_without_kernels(tmp_path: Path) -> None:
    """The package's Python files and nothing else, in a process of its own."""
    source = Path(mk.__file__).parent
    shutil.copytree(
        source, tmp_path / "mtlkernels", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    program = """
        import sys
        sys.path[:] = [entry for entry in sys.path if entry]
        import torch
        from torch import nn
        import mtlkernels as mk
        from mtlkernels import _backends
        _backends.has_triton = lambda: False

        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU()) for _ in range(3))
                self.gates = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

            def forward(self, x):
                hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
                return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]

        mk.convert.register(
            Own,
            experts=lambda level: level.experts,
            gates=lambda level: level.gates,
            routing=lambda level: mk.Routing.mmoe(3, 2),
        )
        print(mk.__file__)
        print(mk.backends()["expert_mixture"]["cpu"])
        model, x = Own(), torch.ones(7, 6)
        expected = model(x)
        print(mk.convert(model).lines[0].detail)
        assert type(model) is Own
        print(mk.convert(model, force=True).lines[0].action)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model(x), expected))
        print(mk.show_config())
    """
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    file, names, reason, action, *config = result.stdout.splitlines()
    assert Path(file).parent == tmp_path / "mtlkernels"
    assert names == "('reference',)"
    assert reason.startswith("fused it would be slower on 'cpu': ")
    assert action == "replaced"
    (line,) = [text for text in config if text.startswith("extension ")]
    assert "missing (not built)" in line
    told = reason.removeprefix("fused it would be slower on 'cpu': ").removesuffix(
        "; mk.convert(model, force=True) converts it all the same"
    )
    assert line.endswith(told)
