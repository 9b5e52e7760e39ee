"""What is static about a level: encoding, parts, and what is refused."""

from __future__ import annotations

import dataclasses
import random

import pytest

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops.activations import CODES
from mtlkernels.ops.level.call import spec_of
from mtlkernels.ops.level.spec import Layer, LevelSpec
from tests import requires


def random_spec(rng: random.Random) -> LevelSpec:
    """Any wiring; layers with and without norms, dropout and slopes."""
    inputs, experts, gates, layers = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 4)
    plain = rng.random() < 0.5

    def layer() -> Layer:
        if plain:
            return Layer(rng.randrange(7))
        numbers = (rng.choice((0.0, 1e-5, 0.1)), rng.choice((0.0, 1e-3)), rng.choice((0.0, 0.3, 1.0)))
        return Layer(rng.randrange(len(CODES)), rng.randrange(3), *numbers)

    members = [rng.sample(range(experts), rng.randint(1, experts)) for _ in range(gates)]
    of_layers = tuple(layer() for _ in range(layers))
    streams = tuple(rng.randrange(inputs) for _ in range(experts))
    gate_inputs = tuple(rng.randrange(inputs) for _ in range(gates)) if plain and rng.random() < 0.5 else ()
    flat = tuple(e for gate in members for e in gate)
    return LevelSpec(inputs, streams, flat, tuple(map(len, members)), of_layers, gate_inputs)


@pytest.mark.parametrize("seed", range(200))
def test_round_trip(seed: int) -> None:
    spec = random_spec(random.Random(seed))
    assert LevelSpec.decoded(*spec.encoded) == spec
    assert LevelSpec.decoded(*map(list, spec.encoded)).encoded == spec.encoded
    if _extension.loaded():
        ints, floats = _extension.function("recoded_level")(*spec.encoded)
        assert (tuple(ints), tuple(floats)) == spec.encoded


@pytest.mark.parametrize("seed", range(50))
def test_a_part_is_what_its_outputs_depend_on(seed: int) -> None:
    rng = random.Random(seed)
    spec = random_spec(rng)
    mask = [rng.random() < 0.5 for _ in spec.gate_sizes]
    part = spec.reached(mask)
    begin = [sum(spec.gate_sizes[:k]) for k in range(len(mask) + 1)]
    members = [spec.gate_experts[begin[k] : begin[k + 1]] for k in range(len(mask))]
    used = [k for k, flag in enumerate(mask) if flag]
    experts = {e for k in used for e in members[k]}
    inputs = {spec.expert_inputs[e] for e in experts} | {spec.gate_inputs[k] for k in used if spec.gate_inputs}
    assert (set(part.experts), set(part.inputs), list(part.gates)) == (experts, inputs, used)
    groups = spec.split([at in part.places for at in range(spec.num_tensors)])
    assert [i for i, flag in enumerate(groups.inputs) if flag] == sorted(inputs)
    assert list(groups.weights) == [e in experts for e in range(len(spec.expert_inputs))] * len(spec.layers)
    assert list(part.places) == sorted(part.places)
    if used:
        # The part is a level of its own: the same experts, streams and gates under other numbers.
        names = iter(part.spec.gate_experts)
        assert [[part.experts[next(names)] for _ in members[k]] for k in used] == [list(members[k]) for k in used]
        assert [part.inputs[i] for i in part.spec.expert_inputs] == [spec.expert_inputs[e] for e in part.experts]
        assert part.spec.numbers == part.experts
        whole = part.spec.reached([True] * len(used))
        assert whole.places == tuple(range(part.spec.num_tensors))
        assert whole.experts == tuple(range(len(part.experts)))


@pytest.mark.parametrize("seed", range(50))
def test_parts_of_several_losses_stand_side_by_side(seed: int) -> None:
    rng = random.Random(seed)
    spec = random_spec(rng)
    masks = [[rng.random() < 0.5 for _ in spec.gate_sizes] for _ in range(rng.randint(2, 4))]
    part = spec.reached(flag for mask in masks for flag in mask)
    alone = [spec.reached(mask) for mask in masks]
    for name in ("inputs", "experts", "gates"):
        assert getattr(part, name) == tuple(number for one in alone for number in getattr(one, name))
    count = spec.num_tensors
    assert sorted(part.places) == sorted(at + t * count for t, one in enumerate(alone) for at in one.places)
    if not part.gates:
        return
    # Cut again, loss by loss, they are the parts that they were.
    cut = iter(range(len(part.gates)))
    for one in alone:
        own = set(next(cut) for _ in one.gates)
        again = part.spec.reached(k in own for k in range(len(part.gates)))
        if own:
            assert again.spec == one.spec
    # Of tensors that are their places, the part's own are where it says.
    tensors = part.pick(spec.split(range(count)))
    assert [tensor for group in tensors for tensor in group] == [at % count for at in part.places]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate_experts": (0, 5)}, r"spec must name experts in \[0, 2\)"),
        ({"expert_inputs": (0, 1)}, "spec must name streams that there are"),
        ({"gate_inputs": (0, 0)}, "spec must name a stream for each of 1 gates"),
        ({"gate_sizes": (1,)}, "spec must name an expert for each of its gates' logits"),
        ({"gate_sizes": (2, 0)}, "spec must hold an expert, a layer and full gates"),
        ({"layers": ()}, "spec must hold an expert, a layer and full gates"),
        ({"layers": (Layer(99),)}, "spec must hold codes of activations, not 99"),
        ({"layers": (Layer(1, 3),)}, "spec must hold codes of norms, not 3"),
        ({"layers": (Layer(1, dropout=1.5),)}, r"spec must hold rates of dropout in \[0, 1\], not 1.5"),
        ({"layers": (Layer(1, 1),), "gate_inputs": (0,)}, "spec must take the logits of a level with norms"),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    good = LevelSpec(1, (0, 0), (1, 0), (2,), (Layer(1),))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change)


def test_lists_that_are_no_spec() -> None:
    ints, _ = LevelSpec(1, (0, 0), (1, 0), (2,), (Layer(1),)).encoded
    readers = [LevelSpec.decoded]
    readers += [_extension.function("recoded_level")] if _extension.loaded() else []
    for read in readers:
        for wrong in (ints[:3], ints[:-1], (*ints, 0), (*ints[:5], -1, *ints[6:])):
            with pytest.raises(ValueError, match="spec must"):
                read(wrong, ())
        with pytest.raises(ValueError, match="spec must come with 3 floats"):
            read(ints, (0.0,))


@pytest.mark.parametrize(
    "at, value, message",
    [
        (1, 99, "be as long as its counts say"),
        (4, 2, "be as long as its counts say"),
        (6, 1, "name streams that there are"),
        (7, 0, "hold an expert, a layer and full gates"),
        (7, 1, "name an expert for each of its gates' logits"),
        (8, 99, "hold codes of activations, not 99"),
        (9, 3, "hold codes of norms, not 3"),
        (10, 2, r"name experts in \[0, 2\)"),
    ],
)
@requires.cpp_kernels
def test_what_the_operators_refuse(at: int, value: int, message: str) -> None:
    """Who calls an operator directly gives it these lists: 5 counts, streams, sizes, activations, norms, experts."""
    ints = [1, 2, 1, 1, 0, *(0, 0), 2, 1, 0, *(1, 0)]
    recoded = _extension.function("recoded_level")
    assert recoded(ints, []) == (ints, [])
    with pytest.raises(ValueError, match=f"spec must {message}"):
        recoded([*ints[:at], value, *ints[at + 1 :]], [])
    with pytest.raises(ValueError, match=r"spec must hold rates of dropout in \[0, 1\], not 1.5"):
        recoded(ints, [0.0, 0.0, 1.5])


def test_a_spec_is_made_once_for_a_routing() -> None:
    wiring = mk.Routing.mmoe(2, 2).wiring
    assert spec_of(wiring, 1, (Layer(1),), True) is spec_of(wiring, 1, (Layer(1),), True)
    assert spec_of(wiring, 1, (Layer(1),), True) != spec_of(wiring, 1, (Layer(1),), False)
    for step in range(1000):  # a rate of dropout that changes with every step
        spec_of(wiring, 1, (Layer(1, dropout=step / 1000),), False)
    assert len(wiring.specs) <= 64
