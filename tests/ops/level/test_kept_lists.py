"""Calls that serve by their caller's own lists: what was read of them is kept, and never serves for other ones."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops.level import lists
from tests.seeding import seed

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")

ROUTING = mk.Routing((0, 1, 0), ((2, 0), (0, 1, 2)))
SINGLE = mk.Routing((0, 0, 0), ((2, 0), (0, 1, 2)))
WIDTHS = (20, 37, 24)
CALLS = 4  # so many make the last one a kept one


class Level:
    """A caller with lists of parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32, routing: mk.Routing = ROUTING, biases: bool = True) -> None:
        seed(3)

        def make(*shape: int) -> Tensor:
            return (torch.randn(*shape) / 4).to(dtype)

        pairs = list(zip(WIDTHS, WIDTHS[1:], strict=False))
        sizes = [len(gate) for gate in routing.gate_experts]
        self.routing, self.activation = routing, "relu"
        self.weights: list[Any] = [[make(b, a) for _ in range(3)] for a, b in pairs]
        self.biases: Any = [[make(b) for _ in range(3)] for _, b in pairs] if biases else None
        self.gate_weights: Any = [make(size, WIDTHS[0]) for size in sizes]
        self.gate_biases: Any = [make(size) for size in sizes] if biases else None

    def __call__(self, x: Any) -> list[Tensor]:
        gates = {"gate_weights": self.gate_weights, "gate_biases": self.gate_biases}
        args = (x, self.weights, self.biases, None, self.routing)
        with torch.no_grad():
            return list(mk.expert_mixture(*args, activation=self.activation, **gates))

    def anew(self, x: Any) -> list[Tensor]:
        """The outputs of a copy, of which nothing is kept."""
        return copy.deepcopy(self)(x)


def rows(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    seed(count)
    return [torch.randn(count, WIDTHS[0]).to(dtype) for _ in range(2)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    lists.kept_lists.cache_clear()
    yield
    lists.kept_lists.cache_clear()


class Read:
    """Within the block, how many calls were read by ``_C.level``."""

    def __enter__(self) -> Read:
        self.count, function = 0, _extension.function

        def counting(name: str) -> Any:
            self.count += name == "level"
            return function(name)

        self._patch = mock.patch.object(_extension, "function", counting)
        self._patch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.__exit__(*error)


def kept(level: Level, x: Any) -> Level:
    """The level, after calls that made it a kept one."""
    for _ in range(CALLS):
        level(x)
    with Read() as read:
        level(x)
    assert read.count == 0 and len(lists.kept_lists()) == 1
    return level


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


FAULTS = [_boundary, _one_layer, _a_gate_too_many, _another_shape, _another_dtype, _integers_in_the_same_place, _meta]


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


def test_logits_beside_linear_gates_are_refused() -> None:
    x = rows(3)
    level = kept(Level(), x)
    logits = [torch.zeros(3, 2), torch.zeros(3, 3)]
    with torch.no_grad(), pytest.raises((TypeError, ValueError)):
        mk.expert_mixture(x, level.weights, level.biases, logits, ROUTING, gate_weights=level.gate_weights)


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


def test_parameters_that_keep_changing_are_seldom_read() -> None:
    """Behind one first weight others come and go."""
    level, x = Level(), rows(2)
    others = [[t.clone() for t in level.weights[0][1:]], [-t for t in level.weights[0][1:]]]
    expected = []
    for own in others:
        level.weights[0][1:] = own
        expected.append(level.anew(x))
    keep, places = mock.Mock(), lists.kept_lists()

    class Counting:
        serve = staticmethod(places.serve)

        def keep(self, *args: Any) -> None:
            keep()
            places.keep(*args)

    counting = Counting()
    with mock.patch("mtlkernels.ops.level.lists.kept_lists", lambda: counting):
        for i in range(3000):
            level.weights[0][1:] = others[i % 2]
            assert equal(level(x), expected[i % 2])
    assert 2 <= keep.call_count <= 24


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
