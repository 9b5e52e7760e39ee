"""Routing: its constructors, what it is as a value, and its errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import numpy
import pytest

import mtlkernels as mk


def test_mmoe() -> None:
    routing = mk.Routing.mmoe(3, 2)
    assert routing == mk.Routing((0, 0, 0), ((0, 1, 2), (0, 1, 2)))
    assert (routing.num_inputs, routing.num_experts, routing.num_gates) == (1, 3, 2)


def test_cgc_lists_specific_experts_task_by_task_then_shared() -> None:
    routing = mk.Routing.cgc(2, 2, 1)
    assert routing.expert_inputs == (0, 0, 1, 1, 2)
    assert routing.gate_experts == ((0, 1, 4), (2, 3, 4))


def test_cgc_options() -> None:
    routing = mk.Routing.cgc(2, [1, 3], 2, shared_gate=True, shared_first=True, single_input=True)
    assert routing.expert_inputs == (0,) * 6
    assert routing.gate_experts == ((4, 5, 0), (4, 5, 1, 2, 3), (0, 1, 2, 3, 4, 5))
    assert routing.num_inputs == 1


def test_cgc_without_shared_or_specific_experts() -> None:
    assert mk.Routing.cgc(2, 1, 0).gate_experts == ((0,), (1,))
    assert mk.Routing.cgc(2, [0, 1], 1).gate_experts == ((1,), (0, 1))


def test_sequences_become_tuples() -> None:
    routing = mk.Routing([0, 1], [[1, 0], [0]])
    assert routing.expert_inputs == (0, 1)
    assert routing.gate_experts == ((1, 0), (0,))


def test_is_a_value() -> None:
    routing = mk.Routing.cgc(2, 1, 1)
    assert routing == mk.Routing.cgc(2, 1, 1) != mk.Routing.cgc(2, 1, 1, shared_first=True)
    assert {routing: 1}[mk.Routing.cgc(2, 1, 1)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.expert_inputs = (0,)  # type: ignore[misc]
    assert eval(repr(routing), {"Routing": mk.Routing}) == routing


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_are_equal(duplicate: Any) -> None:
    routing = mk.Routing((0, 1, 0), ((2,), (0, 2)))
    again = duplicate(routing)
    assert again == routing and hash(again) == hash(routing)
    assert again.wiring == routing.wiring


def test_wiring_leaves_out_experts_without_a_gate() -> None:
    wiring = mk.Routing((0, 1, 2, 1), ((3, 1), (1,))).wiring
    assert (wiring.live, wiring.idle) == ((1, 3), (0, 2))
    assert (wiring.expert_inputs, wiring.gate_experts, wiring.gate_sizes) == ((1, 1), (1, 0, 0), (2, 1))


def test_numbers_of_numpy_are_ints() -> None:
    """Counts that are computed by NumPy or pandas, as PyTorch's layers take them."""
    one, two, three = map(numpy.int64, (1, 2, 3))
    assert mk.Routing.mmoe(three, numpy.int32(2)) == mk.Routing.mmoe(3, 2)
    assert mk.Routing.cgc(two, two, one, shared_gate=True) == mk.Routing.cgc(2, 2, 1, shared_gate=True)
    assert mk.Routing.cgc(two, [one, two], one) == mk.Routing.cgc(2, [1, 2], 1)
    routing = mk.Routing([one - 1, one], [numpy.arange(2).tolist(), [one]])
    assert routing == mk.Routing((0, 1), ((0, 1), (1,)))
    assert {type(number) for number in (*routing.expert_inputs, *sum(routing.gate_experts, ()))} == {int}


MISTAKES = [
    (((), ((0,),)), ValueError, r"expert_inputs .*at least one expert.*, got an empty"),
    ((0, ((0,),)), TypeError, r"expert_inputs must be a sequence of ints, got int"),
    (("01", ((0,),)), TypeError, r"expert_inputs must be a sequence of ints, got str"),
    ((b"\0\0", ((0,),)), TypeError, r"expert_inputs must be a sequence of ints, got bytes"),
    (((0.0,), ((0,),)), TypeError, r"expert_inputs must hold ints, got float \(0.0\)"),
    (((True,), ((0,),)), TypeError, r"expert_inputs must hold ints, got bool"),
    (((0, -1), ((0,),)), ValueError, r"expert_inputs\[1\] must be .*at least 0, got -1"),
    (((0,), ()), ValueError, r"gate_experts .*at least one gate, got an empty"),
    (((0,), 3), TypeError, r"gate_experts must be a sequence of sequences of ints, got int"),
    (((0,), "a"), TypeError, r"gate_experts must be a sequence of sequences of ints, got str"),
    (((0,), (0,)), TypeError, r"gate_experts\[0\] must be a sequence of ints, got int"),
    (((0,), ((0,), ("0",))), TypeError, r"gate_experts\[1\] must hold ints, got str"),
    (((0,), ((0,), ())), ValueError, r"gate_experts\[1\] must mix at least one expert, got an empty gate"),
    (((0, 0), ((0,), (1, 2))), ValueError, r"gate_experts\[1\] must name experts in \[0, 2\), got expert 2"),
    (((0, 0), ((-1,),)), ValueError, r"gate_experts\[0\] must name experts in \[0, 2\), got expert -1"),
    (((0, 0), ((1, 0, 1),)), ValueError, r"gate_experts\[0\] must name each expert once, got \(1, 0, 1\)"),
]


@pytest.mark.parametrize("arguments, kind, message", MISTAKES)
def test_mistakes(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        mk.Routing(*arguments)
    assert caught.type is kind
    assert re.search(message, str(caught.value)), str(caught.value)


COUNTS = [
    (lambda: mk.Routing.mmoe(0, 1), ValueError, r"num_experts must be at least 1, got 0"),
    (lambda: mk.Routing.mmoe(2, 0), ValueError, r"num_tasks must be at least 1, got 0"),
    (lambda: mk.Routing.mmoe(2.0, 1), TypeError, r"num_experts must be an int, got float"),
    (lambda: mk.Routing.mmoe(2, True), TypeError, r"num_tasks must be an int, got bool"),
    (lambda: mk.Routing.cgc(0, 1, 1), ValueError, r"num_tasks must be at least 1, got 0"),
    (lambda: mk.Routing.cgc(2, -1, 1), ValueError, r"num_specific must be at least 0, got -1"),
    (lambda: mk.Routing.cgc(2, 1, -1), ValueError, r"num_shared must be at least 0, got -1"),
    (lambda: mk.Routing.cgc(2, [1], 1), ValueError, r"num_specific .*one int a task \(2\), got 1 entries"),
    (lambda: mk.Routing.cgc(2, [1, -2], 1), ValueError, r"num_specific\[1\] must be at least 0, got -2"),
    (lambda: mk.Routing.cgc(2, "ab", 1), TypeError, r"num_specific must be .*ints.*, got str"),
    (lambda: mk.Routing.cgc(2, 1.5, 1), TypeError, r"num_specific must be .*int.*, got float"),
    (lambda: mk.Routing.cgc(2, True, 1), TypeError, r"num_specific must be .*int.*, got bool"),
    (lambda: mk.Routing.cgc(2, 1, 1, shared_gate="no"), TypeError, r"shared_gate must be True or False, got str"),
    (
        lambda: mk.Routing.cgc(2, 1, 1, shared_first=None),
        TypeError,
        r"shared_first must be True or False, got NoneType",
    ),
    (lambda: mk.Routing.cgc(2, 1, 1, single_input=1), TypeError, r"single_input must be True or False, got int"),
    (lambda: mk.Routing.cgc(2, [1, 0], 0), ValueError, r"num_specific must give each task an expert .* got \[1, 0\]"),
    (lambda: mk.Routing.cgc(2, 0, 0), ValueError, r"num_specific must give each task an expert .* got 0"),
]


@pytest.mark.parametrize("make, kind, message", COUNTS)
def test_mistakes_in_counts(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert caught.type is kind
    assert re.search(message, str(caught.value)), str(caught.value)
