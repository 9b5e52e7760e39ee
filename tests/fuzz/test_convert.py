"""Random edits of models that ``mk.convert`` knows: some that are always the same, and faults that are planted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from mtlkernels._convert import levels, planning, trial
from mtlkernels.ops import _folding
from tests.fuzz.convert_cases import CASES, ConvertCase, Edit, check
from tests.fuzz.convert_models import Sizes

ALIKE = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@seed(0)
@settings(ALIKE, max_examples=25)
@given(CASES)
def test_random_edits(case: ConvertCase) -> None:
    check(case)


def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial finds what it tries the same."""
    monkeypatch.setattr(planning, "disagreement", lambda *args, **options: None)


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are not looked for."""
    monkeypatch.setattr(planning, "_hook_refusal", lambda module, parts: None)
    deaf_later(monkeypatch)


def deaf_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are looked for by a conversion only."""
    monkeypatch.setattr(levels, "any_hooks", lambda modules, differentiated, tried: False)


def blind_to_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (levels, planning):
        monkeypatch.setattr(module, "several_dtypes", lambda *args: False)


def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial leaves the user's generators where it takes them to."""
    monkeypatch.setattr(trial, "kept_random_state", contextlib.nullcontext)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial leaves behind what a forward writes to that is not its own."""
    monkeypatch.setattr(trial.SharedState, "restore", lambda self: None)


def zeros_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms are folded together in training too, and no trial tells."""
    trusting(monkeypatch)
    monkeypatch.setattr(_folding, "_differentiated", lambda vectors: False)


def edited(
    *kinds: str, place: int = 0, later: bool = False, model: str = "easyrec.MMoE", **options: Any
) -> ConvertCase:
    return ConvertCase(model, edits=tuple(Edit(kind, place, later) for kind in kinds), **options)


# Place 0 is the whole level, 1 its first expert.
BATCH_NORM = Sizes(norm="batch")
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], ConvertCase]] = {
    "outputs": (trusting, edited("a scale")),
    "outputs in evaluation": (trusting, edited("a scale in evaluation", place=1)),
    "outputs on one row": (trusting, edited("a scale on one row")),
    "outputs of another order": (trusting, edited("outputs swapped")),
    "outputs after a change of settings": (trusting, edited("a temperature of 1", place=1)),
    "gradients": (trusting, edited("detached output", place=1)),
    "gradients of the input": (trusting, edited("detached input", input_gradients=True)),
    "random numbers": (trusting, edited("noise in training")),
    "statistics": (trusting, edited("called twice", place=1, sizes=BATCH_NORM, rows=20)),
    "attributes": (trusting, edited("calls counted", place=1)),
    "a global list": (trusting, edited("calls counted in a global list", place=1)),
    "an argument": (trusting, edited("input changed in place")),
    "a hook that is lost": (deaf, edited("forward hook", place=1)),
    "a later hook that is lost": (deaf_later, edited("forward hook", place=1, later=True)),
    "dtypes": (blind_to_dtypes, edited("computed in the weights' dtype", "a module in float64", place=1)),
    "the user's generators": (drawing, edited("an attribute more")),
    "the user's global list": (forgetful, edited("calls counted in a global list", place=1)),
    "gradients that are None": (
        zeros_for_none,
        edited("an attribute more", model="libmtl.CGC", rows=130, training=False, losses="first", dtype="float64"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case = FAULTS[name]
    check(case)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(case)


def test_random_edits_find_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    trusting(monkeypatch)

    @seed(0)
    @settings(ALIKE, max_examples=150)
    @given(CASES)
    def fuzz(case: ConvertCase) -> None:
        check(case)

    with pytest.raises(AssertionError):
        fuzz()


def test_a_case_is_what_it_prints() -> None:
    case = edited("a scale", sizes=BATCH_NORM)
    assert eval(repr(case), {"ConvertCase": ConvertCase, "Sizes": Sizes, "Edit": Edit}) == case


_SMALL = Sizes(tasks=2, experts=1, shared=1, levels=1, units=(4,), gate=(), norm="", activation="relu", rate=0.0)
# What the fuzzer has found, as it printed it.
FOUND = {
    "a bias that is a buffer": ConvertCase(
        "registered level", replace(_SMALL, tasks=1), (Edit("a parameter that is a tensor", 1),), seed=1
    ),
    "a hook on a weight that no loss reaches": ConvertCase(
        "easyrec.MMoE", _SMALL, (Edit("a gradient hook", 4),), losses="last"
    ),
    "bfloat16 beside a kink": ConvertCase(
        "mtreclib.MMoE",
        replace(_SMALL, experts=3, units=(5, 4)),
        (Edit("an attribute more"),),
        rows=20,
        dtype="bfloat16",
        losses="first",
    ),
    "a norm that two experts share since the conversion": ConvertCase(
        "libmtl.MMoE", replace(_SMALL, tasks=1), (Edit("a module shared", later=True),), rows=20
    ),
    "statistics in another dtype, of a norm without weights": ConvertCase(
        "registered level",
        replace(_SMALL, tasks=1, norm="batch"),
        (Edit("a norm without weights"), Edit("a norm without weights")),
        dtype="float64",
    ),
    "a norm in float32 that float64 does not take": ConvertCase(
        "deepctr.PLE", replace(_SMALL, tasks=1, gate=(4,), norm="batch"), (Edit("a norm in float32"),), rows=20
    ),
    "a hook behind accumulation for a gate that no loss reaches": ConvertCase(
        "easyrec.MMoE",
        replace(_SMALL, experts=2),
        (Edit("a hook behind accumulation", 8),),
        losses="first",
    ),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_what_was_found_before(case: ConvertCase) -> None:
    check(case)
