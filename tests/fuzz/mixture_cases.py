"""Cases of ``gated_mixture``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import tensors_in
from tests.fuzz import calls, routings, tensors
from tests.fuzz.calls import Meaning, Way  # noqa: F401  (the case's repr names it)
from tests.fuzz.routings import Wires
from tests.ops.agreement import reference_op
from tests.ops.gated_mixture.definition import formula


@dataclass(frozen=True)
class MixtureCase(tensors.CallCase):
    """A call of ``gated_mixture``."""

    rows: int
    features: int
    routing: Wires
    logits_dtype: str = ""
    joined: bool = False


@st.composite
def _cases(draw: st.DrawFn) -> MixtureCase:
    routing = draw(routings.wires)
    return MixtureCase(
        rows=draw(tensors.rows),
        features=draw(tensors.widths_or_none),
        routing=routing,
        logits_dtype=draw(st.sampled_from(("", "", "float32"))),
        joined=draw(st.booleans()),
        **tensors.call(draw, "gated_mixture", len(routing.gates)),
    )


CASES: st.SearchStrategy[MixtureCase] = _cases()


def by_softmax(experts: Mapping[int, Tensor], logits: Sequence[Tensor], routing: mk.Routing) -> list[Tensor]:
    """Each gate by itself, by PyTorch's softmax, which makes NaN of all shares where one logit is infinite."""
    return [
        (own.softmax(1).unsqueeze(2) * torch.stack([experts[e] for e in gate], 1)).sum(1)
        for gate, own in zip(routing.gate_experts, logits, strict=True)
    ]


def by_pytorch(experts: Tensor, gate_logits: Any, routing: mk.Routing) -> list[Tensor]:
    """What a user would write."""
    logits = routings.split(gate_logits, routing) if isinstance(gate_logits, Tensor) else gate_logits
    return by_softmax(dict(enumerate(experts.unbind(1))), [own.to(experts.dtype) for own in logits], routing)


def check(case: MixtureCase) -> None:
    """Outputs and gradients against the formula.

    Raises:
        AssertionError: what is wrong.
    """
    make = case.maker()
    made = make.gated_mixture(case.rows, case.features, case.routing.routing(), joined_logits=case.joined)
    if case.logits_dtype and case.dtype != "float64":
        make.dtype = torch.float32
        logits = make.logits(case.rows, case.routing.routing(), joined=case.joined)
        made.arguments["gate_logits"] = logits  # type: ignore[index]
    baseline = functools.partial(reference_op, mk.gated_mixture)
    if case.special:
        make.put(case.special, make.rng.choice(list(tensors_in(list(made.arguments.values())))))
        calls.check_special(mk.gated_mixture, by_pytorch, made, case.way, case.used)
        return
    by_formula = case.way.implementation == "reference"
    meaning = Meaning(formula, formula if by_formula else baseline)
    calls.check(mk.gated_mixture, meaning, made, case.way, case.used)
