"""Calls that serve by their caller's own lists: what was read of them is kept, and never serves for other ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from mtlkernels import _backends, _dumps, _extension
from mtlkernels.ops.level import lists
from tests.ops.level.own_lists import CALLS, ROUTING, SINGLE, Level, Read, equal, kept, nothing_kept, rows  # noqa: F401

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


@pytest.mark.parametrize("isa", _extension.instruction_sets() or [""])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("routing", [ROUTING, SINGLE])
def test_the_same_bits(dtype: torch.dtype, routing: mk.Routing, biases: bool, isa: str) -> None:
    with _extension.instruction_set(isa):
        level = Level(dtype, routing, biases)

        def streams(count: int) -> Any:
            return rows(count, dtype) if routing is ROUTING else rows(count, dtype)[0]

        kept(level, streams(2))
        for count in (0, 1, 2, 5, 8, 9, 16, 40, 100):
            x = streams(count)
            with Read() as read:
                found = level(x)
            assert read.count == 0
            assert equal(found, level.anew(x))


def test_two_calls_and_then_it_is_kept() -> None:
    """One that is made once costs nothing more."""
    level, x = Level(), rows(2)
    counts = []
    for _ in range(CALLS):
        with Read() as read:
            level(x)
        counts.append((read.count, len(lists.kept_lists())))
    assert counts == [(1, 0), (1, 1), (0, 1), (0, 1)]


def test_what_served_long_is_soon_kept_again() -> None:
    level, x = kept(Level(), rows(3)), rows(3)

    def until_kept() -> int:
        for count in range(1, 40):
            with Read() as read:
                level(x)
            if not read.count:
                return count
        return 40

    waits = []
    for service in (0, 0, 0, 100):
        for _ in range(service):
            level(x)
        level.weights[1][2] = -level.weights[1][2]
        level(x)  # finds that out
        waits.append(until_kept())
    assert waits[0] < waits[1] < waits[2] and waits[3] <= waits[0]


def test_lists_may_be_made_anew_for_each_call() -> None:
    """The tensors are what counts."""
    level, x = kept(Level(), rows(3)), rows(3)
    other = copy.copy(level)
    other.weights = [tuple(layer) for layer in level.weights]
    other.biases = tuple(list(layer) for layer in level.biases)
    expected = level.anew(x)
    with Read() as read:
        assert equal(other(x), expected)
    assert read.count == 0


@pytest.mark.parametrize("hidden", [True, False])
def test_experts_without_units_are_not_kept(hidden: bool) -> None:
    level, x = Level(biases=False), rows(3)
    for e, (first, last) in enumerate(zip(*level.weights, strict=True)):
        if hidden:
            level.weights[0][e], level.weights[1][e] = first[:0].clone(), last[:, :0].clone()
        else:
            level.weights[1][e] = last[:0].clone()
    expected = level(x)
    for _ in range(2 * CALLS):
        with Read() as read:
            assert equal(level(x), expected)
        assert read.count == 1
    assert len(lists.kept_lists()) == 0


def _new_weight(level: Level) -> None:
    level.weights[1][2] = -level.weights[1][2]


def _new_first_weight(level: Level) -> None:
    level.weights[0][0] = -level.weights[0][0]


def _data(level: Level) -> None:
    level.weights[0][1].data = 2 * level.weights[0][1]


def _in_place(level: Level) -> None:
    level.weights[0][1].mul_(2)


def _strides(level: Level) -> None:
    level.weights[0][1] = (2 * level.weights[0][1]).t().contiguous().t()


def _transposed_where_it_lies(level: Level) -> None:
    weight = level.weights[0][1]
    weight.set_(weight.untyped_storage(), 0, weight.shape, (1, weight.shape[0]))


def _negated_where_it_lies(level: Level) -> None:
    level.weights[0][1] = torch._neg_view(level.weights[0][1])


def _swapped(level: Level) -> None:
    level.weights[0][1], level.weights[0][2] = level.weights[0][2], level.weights[0][1]


def _new_bias(level: Level) -> None:
    level.biases[1][0] = level.biases[1][0] + 1


def _no_bias_in_a_layer(level: Level) -> None:
    level.biases[0] = None


def _no_biases(level: Level) -> None:
    level.biases = None


def _new_gate(level: Level) -> None:
    level.gate_weights[1] = -level.gate_weights[1]


def _no_gate_bias(level: Level) -> None:
    level.gate_biases[1] = None


def _stacked(level: Level) -> None:
    level.weights[1] = -torch.stack(level.weights[1])


def _joined_gates(level: Level) -> None:
    level.gate_weights = -torch.cat(level.gate_weights)


def _activation(level: Level) -> None:
    level.activation = "silu"


def _activations(level: Level) -> None:
    level.activation = ["relu", "silu"]  # type: ignore[assignment]


def _routing(level: Level) -> None:
    level.routing = mk.Routing((0, 1, 0), ((0, 2), (0, 1, 2)))


CHANGES = [
    _new_weight,
    _new_first_weight,
    _data,
    _in_place,
    _strides,
    _transposed_where_it_lies,
    _negated_where_it_lies,
    _swapped,
    _new_bias,
    _no_bias_in_a_layer,
    _no_biases,
    _new_gate,
    _no_gate_bias,
    _stacked,
    _joined_gates,
    _activation,
    _activations,
    _routing,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Callable[[Level], None]) -> None:
    """At the next call, and at all that follow it, of which some are kept again."""
    x = rows(3)
    level = kept(Level(), x)
    before = level(x)
    change(level)
    with mk.use_backend("reference"):
        expected = level(x)
    found = [level(x) for _ in range(2 * CALLS)]
    assert not equal(found[0], before), "the change changed nothing, so that this test cannot fail"
    assert all(equal(later, found[0]) for later in found)
    torch.testing.assert_close(found[0], expected)


def _boundary(level: Level) -> None:
    """The same tensors one after another."""
    level.weights = [[*level.weights[0], level.weights[1][0]], level.weights[1][1:]]


def _one_layer(level: Level) -> None:
    level.weights = [[*level.weights[0], *level.weights[1]]]


def _a_gate_too_many(level: Level) -> None:
    level.gate_weights = [*level.gate_weights, level.gate_weights[0]]


def _another_shape(level: Level) -> None:
    weight = level.weights[0][0]
    weight.set_(weight.untyped_storage(), 0, (weight.shape[0] - 1, weight.shape[1]), weight.stride())


def _another_dtype(level: Level) -> None:
    level.weights[0][0] = level.weights[0][0].view(torch.int32).view(torch.float32).to(torch.float64)


def _integers_in_the_same_place(level: Level) -> None:
    level.weights[0][0] = level.weights[0][0].view(torch.int32)


def _meta(level: Level) -> None:
    level.weights[0][1] = level.weights[0][1].to("meta")


def _no_weights(level: Level) -> None:
    level.weights = []


def _a_layer_without_weights(level: Level) -> None:
    level.weights = [[], level.weights[1]]


def _no_list(level: Level) -> None:
    level.weights = 1  # type: ignore[assignment]


def _no_list_of_experts(level: Level) -> None:
    level.weights = [1, level.weights[1]]


def _no_tensor(level: Level) -> None:
    level.weights[0][1] = 1


def _no_tensor_in_front(level: Level) -> None:
    level.weights[0][0] = 1


def _biases_of_one_layer(level: Level) -> None:
    level.biases = level.biases[:1]


FAULTS = [
    _boundary,
    _one_layer,
    _a_gate_too_many,
    _another_shape,
    _another_dtype,
    _integers_in_the_same_place,
    _meta,
    _no_weights,
    _a_layer_without_weights,
    _no_list,
    _no_list_of_experts,
    _no_tensor,
    _no_tensor_in_front,
    _biases_of_one_layer,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_in_the_same_words(fault: Callable[[Level], None]) -> None:
    x = rows(3)
    plain, level = Level(), kept(Level(), x)
    fault(plain)
    fault(level)
    with pytest.raises((TypeError, ValueError)) as expected:
        plain(x)
    for _ in range(3):
        with pytest.raises(type(expected.value)) as found:
            level(x)
        assert str(found.value) == str(expected.value)


INPUTS = {
    "one too few": lambda x: x[:1],
    "one too many": lambda x: [*x, x[0]],
    "of another width": lambda x: [t[:, 1:] for t in x],
    "of different rows": lambda x: [x[0], x[1][1:]],
    "in three dimensions": lambda x: [t.unsqueeze(0) for t in x],
    "of another dtype": lambda x: [t.double() for t in x],
    "not tensors": lambda x: [t.tolist() for t in x],
    "none": lambda x: [],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_refused_in_the_same_words(kind: str) -> None:
    x = rows(3)
    level = kept(Level(), x)
    with pytest.raises((TypeError, ValueError)) as expected:
        level.anew(INPUTS[kind](x))
    with pytest.raises(type(expected.value)) as found:
        level(INPUTS[kind](x))
    assert str(found.value) == str(expected.value)


def test_a_list_of_one_tensor_is_not_one_tensor() -> None:
    """Where the routing has several streams: one tensor is read by everybody, a list of one is a fault."""
    x = rows(3)
    level = kept(Level(), x[0])
    with pytest.raises(ValueError) as expected:
        level.anew(x[:1])
    with pytest.raises(ValueError) as found:
        level(x[:1])
    assert str(found.value) == str(expected.value)
    lists.kept_lists.cache_clear()
    single = kept(Level(routing=SINGLE), x[:1])
    assert equal(single(x[:1]), single.anew(x[0])) and equal(single(x[0]), single.anew(x[0]))


def test_logits_beside_linear_gates_are_refused() -> None:
    x = rows(3)
    level = kept(Level(), x)
    logits = [torch.zeros(3, 2), torch.zeros(3, 3)]
    with torch.no_grad(), pytest.raises((TypeError, ValueError)):
        mk.expert_mixture(x, level.weights, level.biases, logits, ROUTING, gate_weights=level.gate_weights)


def test_gate_norms_are_not_served_by_a_call_without() -> None:
    x = rows(3)
    level = kept(Level(), x)
    norms = [nn.BatchNorm1d(len(gate), eps=3.0).eval() for gate in ROUTING.gate_experts]
    options = {"gate_weights": level.gate_weights, "gate_biases": level.gate_biases, "gate_norms": norms}

    def call() -> Any:
        return mk.expert_mixture(x, level.weights, level.biases, None, ROUTING, **options)

    with torch.no_grad():
        with mk.use_backend("reference"):
            expected = call()
        torch.testing.assert_close(call(), expected)


def test_calls_that_are_to_enter_an_implementation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is asked for by name; and any, where calls that fail are saved."""
    x, entered, found = rows(3), [], _backends._found
    level = kept(Level(), x)
    monkeypatch.setattr(_backends, "_found", lambda *args: entered.append(args[2]) or found(*args))
    with mk.use_backend("reference"):
        level(x)
    monkeypatch.setattr(_dumps, "folder", tmp_path / "dumps")
    level(x)
    assert entered == ["reference", None]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # PyTorch makes tangents of it
def test_who_looks_on_sees_what_is_his() -> None:
    """Gradients, autocast, another implementation, transforms and modes: each as if nothing was kept."""
    x = rows(3)
    level = kept(Level(), x)
    leaves = [t.clone().requires_grad_() for t in x]
    outputs = mk.expert_mixture(leaves, level.weights, level.biases, None, ROUTING, gate_weights=level.gate_weights)
    assert all(t is not None for t in torch.autograd.grad([y.sum() for y in outputs], leaves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert level(x)[0].dtype == torch.bfloat16
    with mk.use_backend("reference"):
        plain = level(x)
    torch.testing.assert_close(plain, level(x))
    batched = torch.func.vmap(lambda *t: tuple(level(list(t))))(*(torch.stack([t, 2 * t]) for t in x))
    torch.testing.assert_close([y[0] for y in batched], level(x))
    with FlopCounterMode(display=False) as counter:
        level(x)
    assert counter.get_total_flops() > 0
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, torch.ones_like(t)) for t in x]
        assert all(forward_ad.unpack_dual(y).tangent is not None for y in level(dual))
    with Read() as read:
        level(x)
    assert read.count == 0, "what looked on has made it forget"
