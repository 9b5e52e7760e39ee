"""Calls of few rows, in which a level that is not one call, or has layer norm, is as fast by its own code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk
from mtlkernels._convert import paying
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
        call(level, 9, mode)
        assert chains
        chains.clear()
        for rows in (9, 2, 5):
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
