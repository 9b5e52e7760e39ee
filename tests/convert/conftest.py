"""Fixtures of the conversion tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import mtlkernels as mk
from mtlkernels._convert import evaluation, paying, planning
from mtlkernels._convert.calls import Serving
from mtlkernels._convert.paying import in_trial
from mtlkernels.ops import _fusing
from mtlkernels.ops.level.kept import Patience

# Files that convert library models as they are, again and again: a trial takes longer than most of their tests, and the
# first of a process speaks for all of models that are printed alike.
TRIED_ONCE = {
    f"test_{name}.py" for name in ("adatt", "batch_norm", "conversion", "levels", "numbers", "parts", "training")
}
# Files that say when calls are kept.
PATIENT = ("test_kept.py", "test_readings.py", "test_readings_held.py", "test_seen.py")
_passed: dict[tuple[Any, ...], Any] = {}


@pytest.fixture(autouse=True)
def _tried_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.name not in TRIED_ONCE:
        return
    tried = planning._trial

    def once(trunk: Any, module: Any, plan: Any) -> Any:
        key = trunk, type(module), repr(module), str(plan)
        found = _passed[key] if key in _passed else tried(trunk, module, plan)
        if found[0] is None:
            _passed[key] = found
        return found

    monkeypatch.setattr(planning, "_trial", once)


@pytest.fixture(autouse=True)
def _kept_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls keep is kept from the first on, so that whatever is edited later is edited behind it."""
    if request.path.name not in PATIENT:
        monkeypatch.setattr(Patience, "is_over", lambda self: True)


@pytest.fixture(autouse=True)
def _no_layer_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow layers of tests are fused from as many rows on as wide ones."""
    monkeypatch.setattr(_fusing, "SMALL", 0)
    monkeypatch.setattr(evaluation, "SMALL_EXPERT", 0)


@pytest.fixture
def any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels are evaluated in parts, and with layer norm, on however few rows."""
    for name in ("LAYER_NORM_ROWS", "PARTS_ROWS", "NORMED_PARTS_ROWS"):
        monkeypatch.setattr(paying, name, (0, 0, 0))


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of experts of each fused call that is not a trial's."""
    calls: list[int] = []

    def counted(inputs: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_trial():
            calls.append(len(weights[0]))
        return mk.expert_mixture(inputs, weights, *args, **kwargs)

    serve = Serving.serve

    def served(self: Serving, routing: mk.Routing, inputs: Any) -> Any:
        outputs = serve(self, routing, inputs)
        if outputs is not None:
            calls.append(routing.num_experts)
        return outputs

    monkeypatch.setattr(evaluation, "expert_mixture", counted)
    monkeypatch.setattr(Serving, "serve", served)
    yield calls


@pytest.fixture
def mixings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of experts of each mixing that is not a trial's, where the experts are evaluated before."""
    calls: list[int] = []
    mix_list = evaluation.mix_list

    def counted(experts: Any, *args: Any) -> Any:
        if not in_trial():
            calls.append(len(experts))
        return mix_list(experts, *args)

    monkeypatch.setattr(evaluation, "mix_list", counted)
    return calls


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chains of experts that were read."""
    read: list[Any] = []
    read_chain = evaluation.read_chain
    monkeypatch.setattr(evaluation, "read_chain", lambda chain: read.append(chain) or read_chain(chain))
    return read
