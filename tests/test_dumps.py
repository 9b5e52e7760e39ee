"""Calls that failed, saved and run again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _backends, _dumps
from mtlkernels.__main__ import main
from mtlkernels.testing import LAYOUTS, CaseFactory, evaluate, laid_out
from tests import requires

ROOT = Path(__file__).parents[1]


class Broken(RuntimeError):
    """What an implementation raises."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As with the environment variable."""
    monkeypatch.setattr(_dumps, "folder", tmp_path / "dumps")
    monkeypatch.setattr(_dumps, "_numbers", iter(range(1000)))
    return tmp_path / "dumps"


def plant(monkeypatch: pytest.MonkeyPatch, op: str, direction: str, error: Exception) -> None:
    """A fault in the reference."""

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setitem(_backends._references, (op, direction), fail)


CALLS: dict[str, Any] = {
    "level": (mk.expert_mixture, lambda make: make.expert_mixture(5, [4, 3, 2], mk.Routing.mmoe(3, 2))),
    "gated_mixture": (mk.gated_mixture, lambda make: make.gated_mixture(5, 3, mk.Routing.mmoe(3, 2))),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", list(CALLS))
def test_a_call_that_fails_is_saved_and_fails_again(
    op: str, direction: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    public, make = CALLS[op]
    case = make(CaseFactory(0, torch.float32))
    with monkeypatch.context() as planted:
        plant(planted, op, direction, Broken("a fault"))
        with mk.use_backend("reference"), pytest.raises(Broken) as raised:
            evaluate(public, case)
        (path,) = folder.iterdir()
        assert str(raised.value).startswith("a fault\n")
        assert f"`python -m mtlkernels replay {path}` runs it again" in str(raised.value)
        saved = torch.load(path, weights_only=True)
        assert (saved["op"], saved["direction"], saved["implementation"]) == (op, direction, "reference")
        assert saved["error"] == "Broken: a fault"
        assert main(["replay", str(path)]) == 1
        assert "reference fails: Broken: a fault" in capsys.readouterr().out
    assert main(["replay", str(path)]) == 0  # without the fault
    text = capsys.readouterr().out
    assert "reference does not fail" in text and f"{op}_{direction} by reference, saved with mtlkernels" in text
    assert ": 0 from the reference's, whose largest value is" in text
    assert "LevelSpec(" in text if op == "level" else "gate_sizes: [3, 3]" in text


@requires.cpp_kernels
def test_distances_from_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of C++ kernels that failed once."""
    u, z = torch.randn(3, 5, 4), torch.tensor([[0.5, 0.0, 1.0]])
    expected = mk.snr_aver(u, z)
    found = _backends._found

    def broken(*args: Any) -> Any:
        def run(*_: Any) -> Any:
            raise MemoryError

        return run

    with monkeypatch.context() as planted:
        planted.setattr(_backends, "_found", broken)
        with pytest.raises(MemoryError) as raised:
            mk.snr_aver(u, z)
    assert "is saved" in str(raised.value)
    (path,) = folder.glob("snr_aver_forward-cpp-*.pt")
    assert main(["replay", str(path)]) == 0
    text = capsys.readouterr().out
    assert "cpp does not fail\nreference does not fail\nresult 0 float32 [5, 4]: " in text
    assert "MemoryError" in text and "u: [float32 [5, 4], float32 [5, 4], float32 [5, 4]]" in text
    assert found is _backends._found and torch.equal(mk.snr_aver(u, z)[0], expected[0])


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_no_call_takes_a_way_on_which_it_could_not_be_saved(
    wants_gradient: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, seen = mk.nn.MMoE(4, 2, (8,), num_experts=2), []

    def saving(run: Any, op: str, direction: str, name: str, args: Any) -> Any:
        seen.append((op, direction))
        return run(*args)

    monkeypatch.setattr(_dumps, "saving", saving)
    with torch.set_grad_enabled(wants_gradient):
        total = sum(y.sum() for y in trunk(torch.ones(3, 4)))
        mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))
        mk.snr_trans(torch.ones(2, 3, 4), torch.ones(2, 2, 5, 4), torch.ones(2, 2))
        mk.pcgrad([[torch.ones(2)], [torch.ones(2)]])
        if wants_gradient:
            total.backward()
    ways = [(op, "forward") for op in ("level", "snr_aver", "snr_trans")]
    ways += [("pcgrad", direction) for direction in ("gram", "weights", "combine")]
    assert seen == [*ways, *([("level", "backward")] if wants_gradient else [])]


@pytest.mark.parametrize("error", [ValueError("a value"), TypeError("a kind")])
def test_refused_arguments_are_not_saved(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "snr_aver", "forward", error)
    with mk.use_backend("reference"), pytest.raises(type(error), match=f"^{error}$"):
        mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))
    assert not folder.exists()


def test_what_cannot_be_saved_raises_the_first_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "snr_aver", "forward", Broken("a fault"))
    folder.write_text("a file stands where the folder should be")
    with (
        mk.use_backend("reference"),
        pytest.raises(Broken, match=r"a fault\n\(mtlkernels: the call could not be saved"),
    ):
        mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))


def test_a_loop_does_not_fill_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "snr_aver", "forward", Broken())
    for _ in range(_dumps._MAX_FILES + 2):
        with mk.use_backend("reference"), pytest.raises(Broken) as raised:
            plant(monkeypatch, "snr_aver", "forward", Broken())
            mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))
    assert len(list(folder.iterdir())) == _dumps._MAX_FILES
    assert "not saved" in str(raised.value)


def fail_anew(monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a call that fails as if in a process of its own, with the PID of those before it."""
    monkeypatch.setattr(_dumps, "_numbers", iter(range(1000)))
    plant(monkeypatch, "snr_aver", "forward", Broken("a fault"))
    with mk.use_backend("reference"), pytest.raises(Broken) as raised:
        mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))
    return str(raised.value)


def test_no_file_overwrites_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes have the same PID, as in containers with one folder."""
    fail_anew(monkeypatch)
    (first,) = folder.iterdir()
    before = first.read_bytes()
    message = fail_anew(monkeypatch)
    (second,) = set(folder.iterdir()) - {first}
    assert first.read_bytes() == before and f"replay {second}`" in message


def test_a_folder_whose_name_has_a_space(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_dumps, "folder", folder / "two words")
    with monkeypatch.context() as planted:
        _, command, _ = fail_anew(planted).split("`")
    *python, replay, path = shlex.split(command)
    assert python == ["python", "-m", "mtlkernels"]
    assert main([replay, path]) == 0, capsys.readouterr().out


def test_a_call_that_is_replayed_is_not_saved_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_anew(monkeypatch)
    (path,) = folder.iterdir()
    plant(monkeypatch, "snr_aver", "forward", Broken("another fault"))
    assert main(["replay", str(path)]) == 1
    assert list(folder.iterdir()) == [path] and _dumps.folder == folder
    text = capsys.readouterr().out
    assert "reference fails: Broken: another fault" in text and "is saved" not in text


def windows(numbers: torch.Tensor) -> torch.Tensor:
    """Rows that overlap."""
    return numbers.as_strided((4, 3), (2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_come_back_as_they_lay(layout: str) -> None:
    tensor = laid_out(torch.randn(5, 6, dtype=torch.bfloat16), layout)
    row, scalar = torch.randn(1000, 1000)[3, 7:11], torch.tensor(2.5, dtype=torch.float64)
    negative = torch.randn(3, 2, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for before in (
        tensor,
        row,
        torch.ones(0, 3),
        torch.ones(4, 100)[:0, :3],
        torch.ones(1, 3).expand(0, 3),
        scalar,
        windows(row[0] + torch.arange(9)),
        negative,
    ):
        content = _dumps.encoded(before)
        assert content["elements"].untyped_storage().nbytes() <= before.numel() * before.element_size()
        after = _dumps.decoded(content)
        assert torch.equal(before, after) and before.dtype == after.dtype
        assert before.shape == after.shape and before.stride() == after.stride()
        assert before.numel() == 0 or before.data_ptr() % 64 == after.data_ptr() % 64


def test_a_file_has_the_elements_of_the_call_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what lies between them in memory, which is not the call's, nor that once for each argument."""
    secret = 1234.5
    table = torch.full((64, 8, 32), secret)
    table[..., :16] = 0
    plant(monkeypatch, "snr_aver", "forward", Broken("a fault"))
    with mk.use_backend("reference"), pytest.raises(Broken):
        mk.snr_aver(table[..., :16].unbind(1), torch.ones(1, 8))
    (path,) = folder.iterdir()
    saved = torch.load(path, weights_only=True)["arguments"]["u"]
    storages = [value.untyped_storage() for argument in saved for value in argument.values() if torch.is_tensor(value)]
    assert sum(storage.nbytes() for storage in storages) == 8 * 64 * 16 * 4
    assert torch.tensor(secret).numpy().tobytes() not in path.read_bytes()
    u = _dumps.decoded(saved)
    assert [t.stride() for t in u] == [(256, 1)] * 8 and not any(t.any() for t in u)


def test_errors_without_a_message_of_their_own() -> None:
    """As a KeyError has, whose argument is the key."""
    error = KeyError(3)
    _dumps._extend(error, "words")
    assert error.args == (3, "words")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_the_first_format(layout: str) -> None:
    """Which had all that lay between the first element and the last."""
    before = laid_out(torch.randn(5, 6), layout)
    steps = sum((size - 1) * stride for size, stride in zip(before.shape, before.stride(), strict=True))
    content = {key: value for key, value in _dumps.encoded(before).items() if key != "elements"}
    after = _dumps.decoded({**content, "tensor": before.as_strided((steps + 1,), (1,)).clone()})
    assert torch.equal(before, after) and before.stride() == after.stride()
    assert 1 in _dumps.READABLE


def test_files_that_are_no_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.pt"
    assert main(["replay", str(path)]) == 2
    path.write_bytes(b"no such file")
    assert main(["replay", str(path)]) == 2
    assert capsys.readouterr().out.count("cannot be read") == 2
    torch.save({"a file of": "something else"}, path)
    assert main(["replay", str(path)]) == 2
    assert "is not a call that mtlkernels has saved" in capsys.readouterr().out
    torch.save({"format": 3}, path)
    assert main(["replay", str(path)]) == 2
    assert "must be of a format that this version of mtlkernels reads, 1 and 2, got 3" in capsys.readouterr().out


def test_the_environment_variable(tmp_path: Path) -> None:
    code = """
import torch, mtlkernels as mk
from mtlkernels import _backends
def fail(*args):
    raise RuntimeError("a fault")
_backends._references["snr_aver", "forward"] = fail
with mk.use_backend("reference"):
    mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MTLKERNELS_DUMP": str(tmp_path)}
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    (path,) = tmp_path.iterdir()
    assert (
        f"RuntimeError: a fault\n(mtlkernels: the call is saved; `python -m mtlkernels replay {path}`" in result.stderr
    )
