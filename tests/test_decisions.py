"""What is logged of decisions."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _backends, _decisions, _extension
from tests import requires

ROOT = Path(__file__).parents[1]
X = torch.ones(3, 4)
TRUNK = mk.nn.MMoE(4, 2, (8,), num_experts=2)


class Kept(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def records() -> Iterator[list[Any]]:
    """The records from now on, with every decision still to be made."""
    logger, handler = logging.getLogger("mtlkernels"), Kept()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    assert mk.log_decisions()
    yield handler.records
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)
    assert not mk.log_decisions()


def said(records: list[Any], op: str) -> list[tuple[Any, ...]]:
    return [(r.direction, r.implementation, r.reason) for r in records if r.op == op]


@requires.cpp_kernels
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_the_direct_way(wants_gradient: bool, records: list[Any]) -> None:
    with torch.set_grad_enabled(wants_gradient):
        TRUNK(X)
    (record,) = records
    assert (record.name, record.levelno) == ("mtlkernels", logging.DEBUG)
    assert (record.op, record.direction, record.implementation) == ("expert_mixture", "forward", "cpp")
    assert (record.device, record.dtype, record.rows) == ("cpu", "float32", 3)
    assert record.getMessage() == f"expert_mixture forward on cpu in float32, B = 3: cpp, as {record.reason}"
    assert "direct call of C++" in record.reason


def test_the_checked_way_and_both_passes(records: list[Any]) -> None:
    with mk.use_backend("reference"):
        sum(y.sum() for y in TRUNK(X)).backward()
    found = said(records, "expert_mixture")
    assert found[1:] == [(way, "reference", "use_backend asks for it") for way in ("forward", "backward")]
    way, how, reason = found[0]
    assert way is None and how == "checks in Python and PyTorch's dispatcher"
    assert "use_backend asks for 'reference'" in reason or "the C++ extension is missing" in reason


def test_each_decision_is_logged_once(records: list[Any]) -> None:
    for rows in (3, 3, 2):
        mk.gated_mixture(torch.ones(rows, 2, 4), torch.ones(rows, 4), mk.Routing.mmoe(2, 2))
    assert len(records) == 1 and records[0].rows == 3
    mk.gated_mixture(torch.ones(3, 2, 4).double(), torch.ones(3, 4), mk.Routing.mmoe(2, 2))
    assert [record.dtype for record in records] == ["float32", "float64"]
    assert mk.log_decisions()
    mk.gated_mixture(torch.ones(3, 2, 4), torch.ones(3, 4), mk.Routing.mmoe(2, 2))
    assert len(records) == 3


@requires.cpp_kernels
@pytest.mark.parametrize(
    "options, reason",
    [
        (
            {"dice_eps": 1},
            "the arguments are not plain tensors of one dtype in lists, of shapes that fit, and plain norms",
        ),
        ({"activation": "sine"}, None),
        ({"routing": mk.Routing((0, 0, 0), ((0, 1), (1, 0)))}, "an expert is not mixed by any gate"),
        ({"inputs": torch.nn.Parameter(torch.ones(3, 4))}, "inputs are not plain tensors"),
    ],
)
def test_why_a_call_is_checked(options: dict[str, Any], reason: str | None, records: list[Any]) -> None:
    arguments = {"inputs": X, "routing": mk.Routing.mmoe(3, 2), **options}
    call = {**arguments, "weights": [torch.ones(3, 5, 4)], "biases": None, "gate_logits": torch.ones(3, 6)}
    if "routing" in options:
        call["gate_logits"] = torch.ones(3, 4)
    if reason is None:  # refused arguments decide nothing
        with pytest.raises(ValueError, match="activation must be one of"):
            mk.expert_mixture(**call)
        assert not records
        return
    mk.expert_mixture(**call)
    assert said(records, "expert_mixture")[0][2] == reason


@requires.cpp_kernels
@pytest.mark.parametrize(
    "around, reason",
    [(torch.autocast("cpu", dtype=torch.float16), "autocast is on"), (torch.func.vmap, "looks on")],
    ids=["autocast", "transform"],
)
def test_who_looks_on(around: Any, reason: str, records: list[Any]) -> None:
    if isinstance(around, torch.autocast):
        with around, torch.no_grad():
            TRUNK(X)
    else:
        around(lambda x: TRUNK(x)[0])(X.unsqueeze(0))
    assert reason in said(records, "expert_mixture")[0][2]


def test_without_kernels(records: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_cpp", _extension._Loaded(error="no such file"))
    mk.snr_aver([X, X], torch.ones(2, 2))
    assert said(records, "snr_aver") == [("forward", "reference", "the C++ kernels are missing: no such file")]


def test_other_devices(records: list[Any]) -> None:
    mk.snr_aver([X.to("meta")], torch.ones(2, 1, device="meta"))
    assert said(records, "snr_aver") == [("forward", "reference", "there are no kernels for devices of type 'meta'")]


def test_what_a_gpu_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_is_old_once", lambda device: False)
    for triton, dtype, expected in (
        (True, torch.float32, ("triton", "it comes first there")),
        (True, torch.float64, ("reference", "the Triton kernels take no float64")),
        (False, torch.float32, ("reference", "Triton is not installed")),
    ):
        monkeypatch.setattr(_backends, "has_triton", lambda found=triton: found)
        assert _backends._on_this_gpu("level", "forward", ([torch.ones(2, 2, dtype=dtype)],)) == expected


def test_which_way_pcgrad_takes(records: list[Any]) -> None:
    grads = [[torch.ones(3)], [-torch.ones(3)]]
    mk.pcgrad(grads)
    assert [way for way, *_ in said(records, "pcgrad")] == ["gram", "weights", "combine"]
    records.clear()
    mk.gram([[grad.requires_grad_() for grad in row] for row in grads])
    assert said(records, "pcgrad")[0][:2] == ("gram", "reference")
    assert "a derivative is wanted" in records[0].reason
    weight = torch.ones(2, requires_grad=True)
    mk.optim.PCGrad(torch.optim.SGD([weight])).pc_backward([weight.sum(), -weight.sum()])
    plain = (None, "backward passes by 'grad'", "batched is None, and losses share no level")
    assert said(records, "PCGrad") == [plain]
    trunk = mk.nn.MMoE(600, 2, (500,), num_experts=2)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(trunk.parameters()))
    for rows in (9, 64):
        optimizer.pc_backward([y.sum() for y in trunk(torch.randn(rows, 600))])
    assert said(records, "PCGrad") == [plain, (None, "backward passes by 'levels'", "batched is None")]


def test_what_convert_decides(records: list[Any]) -> None:
    for _ in range(2):
        report = mk.convert(TRUNK)
        assert records.pop().getMessage() == f"convert: {report.lines[0]}"


def test_a_converted_module_that_runs_its_own_code(records: list[Any]) -> None:
    class Level(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 8) for _ in range(2))
            self.gate = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
            return [(self.gate(x).softmax(1).unsqueeze(2) * hidden).sum(1)]

    mk.convert.register(
        Level,
        experts=lambda level: level.experts,
        gates=lambda level: [level.gate],
        routing=lambda level: mk.Routing.mmoe(2, 1),
    )
    level = Level()
    mk.convert(level)
    level.gate.register_forward_hook(lambda module, args, output: None)
    level(X)
    (found,) = said(records, "FusedLevel")
    assert [record.op for record in records] == ["convert", "FusedLevel"]  # and nothing of the trial of a copy
    assert found[1] == "its own code" and "a part that would not be called has a hook" in found[2]


def test_nothing_is_logged_below_the_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mtlkernels"):
        assert not mk.log_decisions()
        TRUNK(X)
    assert not caplog.records


def test_the_flag_follows_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """Where it is asked."""
    with caplog.at_level(logging.DEBUG, logger="mtlkernels"):
        TRUNK(X)
        assert not _decisions.on
        with mk.use_backend("reference"):
            assert _decisions.on
    assert _decisions.on
    mk.convert(TRUNK)
    assert not _decisions.on


def test_compiled_code_is_one_graph_while_decisions_are_logged(records: list[Any], fresh_compiler: None) -> None:
    compiled = torch.compile(TRUNK, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), TRUNK(X))


def test_a_level_that_is_set_before_the_import() -> None:
    code = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s: %(message)s")
import mtlkernels as mk
assert [type(handler) for handler in logging.getLogger("mtlkernels").handlers] == [logging.NullHandler]
import torch
with torch.no_grad():
    mk.nn.MMoE(4, 2, (8,), num_experts=2)(torch.ones(3, 4))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mtlkernels: expert_mixture forward on cpu in float32, B = 3" in result.stdout


def test_conversions_in_several_threads(records: list[Any]) -> None:
    """Their pauses do not end in the order of their beginning; reports are logged while others' trials are at work."""
    one, other = _decisions.paused(), _decisions.paused()
    one.__enter__()
    other.__enter__()
    assert not _decisions.on
    _decisions.report("convert", "a line")
    one.__exit__(None, None, None)
    assert not _decisions.on
    other.__exit__(None, None, None)
    assert _decisions.on
    mk.snr_aver(torch.ones(2, 3, 4), torch.ones(2, 2))
    assert [r.op for r in records] == ["convert", "snr_aver"]
