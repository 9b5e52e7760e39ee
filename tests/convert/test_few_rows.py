"""Calls of few rows, in which a level that is not one call, or has layer norm, is as fast by its own code."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._convert import evaluation, paying
from mtlkernels.ops import _fusing
from mtlkernels.ops._fusing import FOLD_ROWS
from tests.convert.doubles import ExtractionNet, MMoE_Layer
from tests.convert.models import fill

WIDTH = 10
# A level, the experts of each of its fused calls, and the rows from which on it has these: where no gradient is wanted,
# in evaluation with gradients, and in training.
LEVELS: dict[str, tuple[Callable[[], Any], list[int], tuple[int, int, int]]] = {
    "deeper specific experts": (
        lambda: ExtractionNet(WIDTH, (12, 7), shared_units=(7,)),
        [6, 2],
        paying.PARTS_ROWS,
    ),
    "wider shared experts with batch norm": (
        lambda: ExtractionNet(WIDTH, (12, 7), shared_units=(9, 7), norm="batch"),
        [6, 2],
        paying.NORMED_PARTS_ROWS,
    ),
    "layer norm": (lambda: ExtractionNet(WIDTH, (12, 7), norm="layer"), [8], paying.LAYER_NORM_ROWS),
    "the last expert by its modules": (lambda: with_elu(MMoE_Layer(WIDTH, (12, 7))), [3], paying.PARTS_ROWS),
}


def with_elu(level: Any) -> Any:
    level.experts[3].mlp[1] = nn.ELU(0.5)
    return level


def inputs(level: Any, rows: int) -> tuple[Any, ...]:
    if isinstance(level, MMoE_Layer):
        return (torch.randn(rows, WIDTH),)
    return [torch.randn(rows, WIDTH) for _ in range(3)], torch.randn(rows, WIDTH)


def call(level: Any, rows: int, mode: int) -> None:
    with torch.no_grad() if mode == 0 else contextlib.nullcontext():
        level.train(mode == 2)(*inputs(level, rows))


@pytest.mark.parametrize("name", LEVELS)
def test_the_levels_own_code_runs(name: str, fused_calls: list[int]) -> None:
    make, experts, thresholds = LEVELS[name]
    level = fill(make())
    assert mk.convert(level).replaced
    for mode, least in enumerate(thresholds):
        for rows, expected in ((1 if mode < 2 else 2, []), (least - 1, []), (least, experts), (least - 1, [])):
            fused_calls.clear()
            call(level, rows, mode)
            assert fused_calls == expected, f"mode {mode}, {rows} rows"


def test_a_level_in_one_call_is_fused_on_one_row(fused_calls: list[int]) -> None:
    level = fill(ExtractionNet(WIDTH, (12, 7)))
    assert mk.convert(level).replaced
    for mode in range(3):
        fused_calls.clear()
        call(level, 1, mode)
        assert fused_calls == [8]


@pytest.mark.parametrize("name", LEVELS)
def test_the_next_ones_read_nothing(name: str, chains: list[Any]) -> None:
    """Reading a level's modules takes a third of the time that a row takes."""
    level = fill(LEVELS[name][0]())
    assert mk.convert(level).replaced
    for mode in range(3):
        chains.clear()
        call(level, 7, mode)
        assert chains
        chains.clear()
        for rows in (7, 2, 5):
            call(level, rows, mode)
        assert not chains
        call(level, 10, mode)
        assert chains


def test_an_edit_is_seen_after_some_calls(fused_calls: list[int]) -> None:
    level: Any = with_elu(fill(MMoE_Layer(WIDTH, (12, 7))))
    assert mk.convert(level).replaced
    call(level, 4, 0)
    level.experts[3].mlp[1] = nn.ReLU()
    fused_calls.clear()
    for _ in range(100):
        call(level, 4, 0)
    assert fused_calls == [4] * len(fused_calls)
    assert len(fused_calls) > 30


def with_prelu(level: Any) -> Any:
    for expert in level.experts:
        expert.mlp[1] = nn.PReLU()
    return level


def test_slopes_where_gradients_are_wanted(fused_calls: list[int]) -> None:
    """PReLU is served fused on however few rows; in training a level gains from some on."""
    level = with_prelu(fill(MMoE_Layer(WIDTH, (12, 7))))
    assert mk.convert(level).replaced
    for mode, least in enumerate(paying.SLOPES_ROWS):
        for rows in (1, max(1, least - 1), max(1, least)):
            fused_calls.clear()
            call(level, rows, mode)
            assert fused_calls == ([4] if rows >= least else []), f"mode {mode}, {rows} rows"


@pytest.mark.parametrize("norm, least", [("", paying.AUTOCAST_ROWS), ("batch", FOLD_ROWS)])
def test_autocast_casts_all_parameters(norm: str, least: int, fused_calls: list[int]) -> None:
    """To float16 behind checks; to bfloat16 in C++. What is known of such calls says nothing about others."""
    level = fill(ExtractionNet(WIDTH, (12, 7), norm=norm))
    assert mk.convert(level).replaced
    for dtype, rows in itertools.product((torch.float16, torch.bfloat16), (1, least - 1, least, 1)):
        fused_calls.clear()
        with torch.autocast("cpu", dtype):
            call(level, rows, 0)
        assert fused_calls == ([8] if rows >= least or (dtype == torch.bfloat16 and _extension.has_module()) else [])
    fused_calls.clear()
    call(level, 1, 0)
    assert fused_calls == [8]


def test_frozen_batch_norm_where_something_else_wants_gradients(fused_calls: list[int]) -> None:
    """C++ takes norms of calls of which nothing is differentiated; others fold, which pays on many rows."""
    level: Any = fill(ExtractionNet(WIDTH, (12, 7), norm="batch"))
    assert mk.convert(level).replaced
    level.eval().requires_grad_(False)

    def run(rows: int, wants: bool) -> list[int]:
        fused_calls.clear()
        x = [torch.randn(rows, WIDTH, requires_grad=wants) for _ in range(4)]
        level(x[:3], x[3])
        return list(fused_calls)

    assert [run(4, wants) for wants in (False, True, False, True)] == [[8], [], [8], []]
    assert run(FOLD_ROWS, True) == [8]
    level._shared_gate.requires_grad_(True)
    assert run(4, False) == []
    assert run(FOLD_ROWS, False) == [8]


@pytest.mark.parametrize("norm", ["", "batch"])
def test_parameters_of_inference_mode(norm: str, fused_calls: list[int]) -> None:
    """A fused level would save them for its backward pass, which modules save nothing of where nothing needs it."""
    level: Any = fill(ExtractionNet(WIDTH, (12, 7), norm=norm)).eval()
    assert mk.convert(level).replaced
    with torch.inference_mode():
        frozen = {name: value.clone() for name, value in level._task_layers.state_dict().items()}
        names = [name for name in frozen if not norm or "running" in name]
        level._task_layers.load_state_dict({name: frozen[name] for name in names}, assign=True, strict=False)
    level._task_layers.requires_grad_(False)
    fused_calls.clear()
    streams, shared = level(*inputs(level, 300))
    (sum(y.sum() for y in streams) + shared.sum()).backward()
    assert not fused_calls
    assert all(p.grad is not None for p in level._task_gates.parameters())
    with torch.no_grad():
        level(*inputs(level, 300))
    assert fused_calls == [8]


def test_calls_of_fewer_rows_leave_what_is_known_of_more() -> None:
    few = paying.TooFewRows()
    few.note("training", 10)
    few.note("training", 4)
    assert few.are("training", 10) and not few.are("training", 11) and not few.are("serving", 4)


def test_calls_are_read_ever_less_often() -> None:
    few, read = paying.TooFewRows(), []
    for call in range(4000):
        if not few.are("serving", 4):
            few.note("serving", 4)
            read.append(call)
    pauses = [after - before for before, after in zip(read, read[1:], strict=False)]
    assert pauses == [64, 128, 256, 512, 1024, 1024]


def test_kinds_of_calls_are_read_again_each_by_itself() -> None:
    """Where another kind that has too few rows takes its turns."""
    few, read = paying.TooFewRows(), {"serving": 0, "training": 0}
    for _ in range(200):
        for kind in read:
            if not few.are(kind, 4):
                few.note(kind, 4)
                read[kind] += 1
    assert read == {"serving": 3, "training": 3}


def test_norms_of_small_layers_are_folded_for_more_rows(
    monkeypatch: pytest.MonkeyPatch, fused_calls: list[int]
) -> None:
    """Autograd's part in folding costs as much for few weights as for many, and fusing them saves less."""
    monkeypatch.setattr(_fusing, "SMALL", 7 * 12 + 1)
    level = fill(ExtractionNet(WIDTH, (12, 7), norm="batch"))
    assert mk.convert(level).replaced
    for least in (_fusing.SMALL_FOLD_ROWS, FOLD_ROWS):
        for rows, expected in ((least - 1, []), (least, [8])):
            fused_calls.clear()
            call(level, rows, 1)
            assert fused_calls == expected
        monkeypatch.setattr(_fusing, "SMALL", 7 * 12)


@pytest.mark.parametrize("norm", ["", "batch"])
def test_small_levels_in_parts_take_more_rows(
    norm: str, monkeypatch: pytest.MonkeyPatch, fused_calls: list[int]
) -> None:
    monkeypatch.setattr(evaluation, "SMALL_EXPERT", WIDTH * 12 + 12 * 7 + 1)
    level: Any = with_elu(fill(MMoE_Layer(WIDTH, (12, 7), norm=norm)))
    assert mk.convert(level).replaced
    for mode, least in enumerate(paying.SMALL_PARTS_ROWS):
        for rows, expected in ((least - 1, []), (least, [3])):
            fused_calls.clear()
            call(level, rows, mode)
            assert fused_calls == expected


def test_rows_are_counted_on_cpus() -> None:
    """Elsewhere a launch takes longer than what few rows take; replicas of nn.DataParallel have computed weights."""
    size = paying.size_of_call(torch.empty(2, 4, device="meta"), training=True)
    assert size.parts and size.normed_parts and size.small_parts and size.layer_norm
    assert size.rows.turn and size.rows.slopes
    assert not paying.size_of_call(torch.empty(2, 4), training=True).rows.turn


def test_autocast_of_cpus_casts_nothing_elsewhere() -> None:
    with torch.autocast("cpu", torch.float16):
        assert not paying.size_of_call(torch.empty(2, 4), training=False).fused
        assert paying.size_of_call(torch.empty(2, 4, device="meta"), training=False).fused
