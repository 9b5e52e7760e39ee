"""``python -m mtlkernels``: the self-check of an install, with and without faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _backends, _selfcheck
from mtlkernels.__main__ import main
from mtlkernels.ops import snr_trans
from tests import requires

ROOT = Path(__file__).parents[1]
# These are not imported, and the C++ library does not load, as in an install without a compiler, Triton and pytest.
BARE = """
import runpy, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
import torch
def refuse(path):
    raise OSError(f"cannot open {path}")
torch.ops.load_library = refuse
sys.argv = ["mtlkernels"]
runpy.run_module("mtlkernels", run_name="__main__", alter_sys=True)
"""


def only(monkeypatch: pytest.MonkeyPatch, *functions: str) -> None:
    monkeypatch.setattr(_selfcheck, "TRIALS", {name: _selfcheck.TRIALS[name] for name in functions})


def lines(text: str) -> dict[str, str]:
    """What is said of each function."""
    checked = text.partition("Self-check")[2]
    return {name: line for line in checked.splitlines() for name in [line.partition(" ")[0]] if name in TRIALS}


TRIALS = tuple(_selfcheck.TRIALS)


def test_every_function_and_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert {listed for listed, _ in _selfcheck.TRIALS.values()} == set(mk.backends())
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith(mk.show_config())
    found = lines(text)
    assert tuple(found) == TRIALS
    for function, (listed, _) in _selfcheck.TRIALS.items():
        assert found[function].split()[1] == "right"
        assert f"{' and '.join(mk.backends()[listed]['cpu'])} on cpu in float32, bfloat16" in found[function]


def test_an_install_with_nothing_but_the_reference() -> None:
    """With optimization, too, which leaves assertions out."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-O", "-W", "error", "-c", BARE]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all("right  reference on cpu" in line for line in lines(result.stdout).values())
    assert "There are no kernels for cpu here, only the reference" in result.stdout


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_reference_that_is_wrong(
    direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = _backends.reference_implementation("snr_aver", direction)

    def wrong(*args: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda tensor: tensor * 1.05, original(*args))

    only(monkeypatch, "gram", "snr_aver")
    monkeypatch.setitem(_backends._references, ("snr_aver", direction), wrong)
    assert main([]) == 1
    text = capsys.readouterr().out
    found = lines(text)
    assert found["gram"].split()[1] == "right" and found["snr_aver"].split()[1] == "WRONG"
    group = "outputs" if direction == "forward" else "u"
    assert f"reference on cpu in float32, training: {group}: error" in found["snr_aver"]
    assert "report this as a bug, with all of the text above" in text
    assert "snr_aver: WRONG on this machine" in text and 'use_backend("reference")' not in text


@requires.cpp_kernels
def test_kernels_that_are_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the direct way alone, in one dtype alone."""
    direct = snr_trans.direct

    def wrong(op: str, u: Any, *args: Any) -> Any:
        outputs = direct(op, u, *args)
        if outputs is None or torch.is_grad_enabled() or u[0].dtype != torch.float16:
            return outputs
        return tuple(y.index_fill(1, torch.tensor(3), 0.0) for y in outputs)

    only(monkeypatch, "snr_trans")
    monkeypatch.setattr(snr_trans, "direct", wrong)
    assert main([]) == 1
    text = capsys.readouterr().out
    assert "snr_trans       WRONG  cpp on cpu in float16, serving: outputs: error" in text
    assert "float32" not in lines(text)["snr_trans"]
    assert 'put calls into a block `with mtlkernels.use_backend("reference"):`' in text


def test_an_implementation_that_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: Any) -> Any:
        raise MemoryError("no room")

    only(monkeypatch, "gated_mixture")
    monkeypatch.setitem(_backends._references, ("gated_mixture", "backward"), fail)
    assert main([]) == 1
    assert "training: MemoryError: no room" in lines(capsys.readouterr().out)["gated_mixture"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "compares outputs and gradients with float64" in " ".join(capsys.readouterr().out.split())
