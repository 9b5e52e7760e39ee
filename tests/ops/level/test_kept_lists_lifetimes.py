"""What is kept of a caller's lists keeps nothing alive, is bounded, and holds what it read while other threads run."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mtlkernels import _extension
from mtlkernels.ops.level import lists
from tests.ops.level.own_lists import CALLS, Level, Read, equal, kept, nothing_kept, rows  # noqa: F401

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


def test_nothing_is_kept_alive() -> None:
    x = rows(3)
    level = kept(Level(), x)
    gone = weakref.ref(level.weights[0][1])
    del level
    gc.collect()
    assert gone() is None


def test_a_bounded_number_is_kept() -> None:
    x = rows(1)
    levels = [Level() for _ in range(100)]
    for level in levels:
        expected = level(x)
        assert all(equal(level(x), expected) for _ in range(CALLS))
    assert len(lists.kept_lists()) == 64
    with Read() as read:
        levels[-1](x)
        levels[-64](x)
        assert read.count == 0
        levels[0](x)
    assert read.count == 1


def test_what_served_last_stays_where_there_are_too_many() -> None:
    x, levels = rows(1), [Level() for _ in range(65)]
    for level in levels[:64]:
        for _ in range(CALLS):
            level(x)
    levels[0](x)
    for _ in range(CALLS):
        levels[64](x)
    with Read() as read:
        levels[0](x)
        assert read.count == 0
        levels[1](x)
    assert read.count == 1


class Counting:
    """The lists that are kept; how often a call is tried to be."""

    def __init__(self) -> None:
        self._places, self.tries = lists.kept_lists(), 0
        self.serve = self._places.serve

    def keep(self, *args: Any) -> None:
        self.tries += 1
        self._places.keep(*args)


def test_calls_that_train_are_not_kept() -> None:
    """No such call is served by what is kept, so that to keep one takes time for nothing."""
    level, x, counting = Level(), rows(2), Counting()
    with mock.patch("mtlkernels.ops.level.lists.kept_lists", lambda: counting):
        for _ in range(2 * CALLS):
            level.trained(x)
    assert counting.tries == 0
    kept(level, x)


def test_parameters_that_keep_changing_are_seldom_read() -> None:
    """Behind one first weight others come and go."""
    level, x = Level(), rows(2)
    others = [[t.clone() for t in level.weights[0][1:]], [-t for t in level.weights[0][1:]]]
    expected = []
    for own in others:
        level.weights[0][1:] = own
        expected.append(level.anew(x))
    counting = Counting()
    with mock.patch("mtlkernels.ops.level.lists.kept_lists", lambda: counting):
        for i in range(3000):
            level.weights[0][1:] = others[i % 2]
            assert equal(level(x), expected[i % 2])
    assert 2 <= counting.tries <= 24


def test_what_cannot_be_kept_is_seldom_tried() -> None:
    """As biases of which each layer has one tensor."""
    level, x = Level(), rows(2)
    level.biases = [torch.stack(biases) for biases in level.biases]
    expected, counting = level.anew(x), Counting()
    with mock.patch("mtlkernels.ops.level.lists.kept_lists", lambda: counting):
        for _ in range(500):
            assert equal(level(x), expected)
    assert 2 <= counting.tries <= 12
    assert len(lists.kept_lists()) == 0


def test_weights_that_go_while_others_serve() -> None:
    """Memory that nobody else holds any more is held until the call is over."""
    level, x = Level(), rows(2)
    values = [level.weights[0][2], torch.zeros_like(level.weights[0][2])]
    expected = []
    for value in values:
        level.weights[0][2] = value.clone()
        expected.append(level.anew(x))
    wrong: list[list[Tensor]] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            found = level(x)
            if not any(equal(found, true) for true in expected):
                wrong.append(found)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(600):
        level.weights[0][2] = values[i % 2].clone()
        torch.full_like(values[0], 1e6)  # takes the memory of a weight that is gone
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
