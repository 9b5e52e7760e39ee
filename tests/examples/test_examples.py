"""Each example at its smallest, as a process of its own; what it prints about its own equalities has to hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings as filters
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires

ROOT = Path(__file__).parents[2]
EXACT = 1e-12  # of float64
CLOSE = 1e-5  # of float32
TIME = re.compile(r"^  (\S.*?) +(\d+\.\d+) ms +(\d+\.\d+)x$", re.MULTILINE)
OWN = "ignore:Sparse invariant checks are implicitly disabled:UserWarning"  # as in pyproject.toml
REPLACED = 1 if _extension.loaded() else 0  # without kernels convert leaves models alone, and the examples run


TOOLS = [name for name in ("cmake", "ninja") if shutil.which(name) is None]


def run(name: str, *options: str, warnings: Sequence[str] = ("error", OWN)) -> str:
    """What it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    filters = [part for warning in warnings for part in ("-W", warning)]
    command = [sys.executable, *filters, str(ROOT / "examples" / f"{name}.py"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def numbers(text: str, label: str) -> list[float]:
    """Those that follow a label."""
    return [float(found) for found in re.findall(re.escape(label) + r".*?(\d\.?\d*e[+-]\d\d)$", text, re.MULTILINE)]


def timed(text: str) -> list[str]:
    """What was timed."""
    rows = TIME.findall(text)
    assert all(float(milliseconds) > 0 and float(factor) > 0 for _, milliseconds, factor in rows)
    return [name for name, _, _ in rows]


def test_convert_rechub() -> None:
    out = run("convert_rechub", "--rounds", "1", "--steps", "4", "--rows", "16")
    assert out.count("replaced ") == 2 * REPLACED
    assert max(numbers(out, "largest difference of losses, 4 steps in float64")) < EXACT
    assert max(numbers(out, "largest difference of predictions in float32")) < CLOSE
    losses = re.findall(r"^(\d) +(\S+) +(\S+)$", out, re.MULTILINE)
    assert [step for step, *_ in losses] == ["1", "2", "3", "4"]
    assert float(losses[0][1]) == pytest.approx(float(losses[0][2]), rel=CLOSE)
    assert timed(out) == ["as it is", "converted"] * 3


def test_numbers_of_nothing() -> None:
    """Are refused."""
    command = [sys.executable, str(ROOT / "examples" / "ple_pcgrad.py"), "--rows", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "argument --rows: must be at least 1, got 0" in done.stderr


def test_ple_pcgrad() -> None:
    out = run("ple_pcgrad", "--rounds", "1", "--steps", "2", "--rows", "8")
    for name in ("fused, mk.optim.PCGrad, two tasks", "fused, mk.optim.GramWeighted, all tasks"):
        (distance,) = numbers(out, name)
        assert distance < EXACT
    assert len(timed(out)) == 4


@requires.gloo
def test_distributed() -> None:
    out = run("distributed", "--rounds", "1", "--steps", "2", "--rows", "4")
    assert out.count("replaced ") == REPLACED
    assert out.count("all ranks hold the same parameters: True\n") == 2
    distances = numbers(out, "distance from one process with the whole batch")
    assert len(distances) == 2 and max(distances) < EXACT
    assert timed(out) == ["modules", "converted"] * 2


def test_snr_compact() -> None:
    out = run("snr_compact", "--rounds", "1", "--steps", "52", "--rows", "8")
    (is_open,) = map(int, re.findall(r"SNR-Trans: (\d+) of 80 routes open", out))
    full, compact = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) (?:in full|compact)", out))
    assert 0 < is_open < 80
    assert 0 < compact < full
    assert max(numbers(out, "largest difference of outputs")) < CLOSE
    assert timed(out) == ["all routes open", "trained", "compact"] * 3


def saved(request: Any, path: Path) -> Path:
    torch.save(request, path)
    return path


def check_tuples(program: Path, folder: Path) -> None:
    """A trunk returns one; a request may be one."""
    trunk, x = mk.nn.MMoE(4, 2, (8,)).eval(), torch.randn(3, 4)
    request = saved((x,), folder / "tuple.pt")
    with torch.no_grad():
        with filters.catch_warnings():
            filters.simplefilter("ignore")  # it is deprecated, but such models are there
            torch.jit.trace(trunk, (x,), check_trace=False).save(str(folder / "trunk.pt"))
        done = subprocess.run([program, folder / "trunk.pt", request], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(f"{request}.answer"), trunk(x))


@requires.inductor
@requires.cpp_kernels
@pytest.mark.skipif(bool(TOOLS), reason=f"to build the program takes {TOOLS}")
def test_serving_without_python(tmp_path: Path) -> None:
    """The program has no Python in it, answers as the model does, and names what it lacks.

    The other example takes the same package, as PyTorch's compiler needs half a minute for one.
    """
    options = ("--rows", "1", "3", "--threads", "1", "--folder", str(tmp_path))
    out = run("serving/run", *options, warnings=("ignore",))
    assert "the C++ program's answers are the model's own" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["1", "3"]
    program, request = tmp_path / "build" / "serve", tmp_path / "request-3.pt"
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in linked.splitlines()]
    assert "libtorch_cpu.so" in names and not [name for name in names if "python" in name]
    for arguments, said in (
        ((tmp_path / "model.pt2", request), "needs the operators of mtlkernels: give --operators libmtlkernels.so"),
        (("--operators", "nothing.so", tmp_path / "model.pt2", request), "nothing.so: cannot open shared object file"),
        ((tmp_path / "model.pt", tmp_path / "nothing"), "cannot read "),
        ((tmp_path / "model.pt",), "a model and at least one request are wanted"),
        (("--speed", "1", tmp_path / "model.pt", request), "unknown option --speed"),
        (("--threads", "x", tmp_path / "model.pt", request), "--threads must be a number of at least 1, got x"),
        (("--threads", "0", tmp_path / "model.pt", request), "--threads must be a number of at least 1, got 0"),
        ((tmp_path / "model.pt", saved(torch.ones(3), tmp_path / "one.pt")), "must be a list or tuple of tensors, got"),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("serve: ") and said in done.stderr
    (tmp_path / "full.pt").write_bytes(request.read_bytes())
    (tmp_path / "full.pt.answer").symlink_to("/dev/full")
    done = subprocess.run([program, tmp_path / "model.pt", tmp_path / "full.pt"], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write " in done.stderr
    check_tuples(program, tmp_path)
    out = run("export_aot", "--rounds", "1", "--package", str(tmp_path / "model.pt2"), warnings=())
    assert out.count("replaced ") == 2 * REPLACED
    distances = numbers(out, "largest difference between package and library")
    assert len(distances) == 3 and max(distances) < CLOSE
    assert timed(out) == ["as it is", "converted", "converted, packaged"] * 3
