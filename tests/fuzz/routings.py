"""Routings of cases, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st
from torch import Tensor

import mtlkernels as mk


@dataclass(frozen=True)
class Wires:
    """A routing: the stream of each expert, the experts of each gate."""

    streams: tuple[int, ...]
    gates: tuple[tuple[int, ...], ...]

    def routing(self) -> mk.Routing:
        return mk.Routing(self.streams, self.gates)


@st.composite
def _wires(draw: st.DrawFn) -> Wires:
    """Ragged gates in any order, streams that nobody reads, experts that no gate mixes; now and then very many."""
    many = draw(st.integers(0, 19)) == 19
    experts = draw(st.integers(1, 40 if many else 7))
    streams = draw(st.lists(st.integers(0, draw(st.integers(0, 2))), min_size=experts, max_size=experts))
    gate = st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True).map(tuple)
    gates = draw(st.lists(gate, min_size=1, max_size=30 if many else 5))
    return Wires(tuple(streams), tuple(gates))


def split(joined: Tensor, routing: mk.Routing) -> list[Tensor]:
    """The logits of each gate, from those of all."""
    return list(joined.split([len(gate) for gate in routing.gate_experts], 1))


wires: st.SearchStrategy[Wires] = _wires()


def some_of(numbers: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """All of them as often as some or none, in rising order."""
    some = st.lists(st.sampled_from(list(numbers)), unique=True).map(lambda found: tuple(sorted(found)))
    return st.one_of(st.just(tuple(numbers)), some)
