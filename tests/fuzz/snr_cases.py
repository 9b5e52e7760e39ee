"""Cases of ``snr_trans`` and ``snr_aver``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, snr, tensors_in
from tests.fuzz import calls, tensors
from tests.fuzz.calls import Meaning, Way  # noqa: F401  (the case's repr names it)
from tests.ops.agreement import reference_op
from tests.ops.snr_aver import definition as aver
from tests.ops.snr_trans import definition as trans

_SHARES = st.sampled_from(snr.SHARES)


@dataclass(frozen=True)
class TransCase(tensors.CallCase):
    """A call of ``snr_trans``; where it is ``stacked``, all widths are the first ones."""

    rows: int
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]
    share: float = 0.5
    stacked: bool = False
    stacked_inputs: bool = False
    closed_grad: bool = True


@dataclass(frozen=True)
class AverCase(tensors.CallCase):
    """A call of ``snr_aver``."""

    rows: int
    width: int
    inputs: int
    outputs: int
    share: float = 0.5
    closed_grad: bool = True


_SOME_WIDTHS = st.lists(tensors.widths_or_none, min_size=1, max_size=6).map(tuple)


@st.composite
def _trans_cases(draw: st.DrawFn) -> TransCase:
    out_widths, stacked = draw(_SOME_WIDTHS), draw(st.booleans())
    return TransCase(
        rows=draw(tensors.rows),
        in_widths=draw(_SOME_WIDTHS),
        out_widths=out_widths,
        share=draw(_SHARES),
        stacked=stacked,
        stacked_inputs=stacked and draw(st.booleans()),
        closed_grad=draw(st.booleans()),
        **tensors.call(draw, "snr_trans", len(out_widths)),
    )


@st.composite
def _aver_cases(draw: st.DrawFn) -> AverCase:
    outputs = draw(st.integers(1, 9))
    return AverCase(
        rows=draw(tensors.rows),
        width=draw(tensors.widths_or_none),
        inputs=draw(st.integers(1, 9)),
        outputs=outputs,
        share=draw(_SHARES),
        closed_grad=draw(st.booleans()),
        **tensors.call(draw, "snr_aver", outputs),
    )


TRANS_CASES: st.SearchStrategy[TransCase] = _trans_cases()
AVER_CASES: st.SearchStrategy[AverCase] = _aver_cases()


def check_trans(case: TransCase) -> None:
    """Outputs and gradients against the formula.

    Raises:
        AssertionError: what is wrong.
    """
    make = case.maker()
    first_in, first_out = case.in_widths[0], case.out_widths[0]
    made = snr.snr_trans(
        make,
        case.rows,
        [first_in] * len(case.in_widths) if case.stacked else case.in_widths,
        [first_out] * len(case.out_widths) if case.stacked else case.out_widths,
        share=case.share,
        stacked=case.stacked,
        stacked_inputs=case.stacked_inputs,
        closed_grad=case.closed_grad,
    )
    _check(mk.snr_trans, trans.formula, made, make, case)


def check_aver(case: AverCase) -> None:
    """Outputs and gradients against the formula.

    Raises:
        AssertionError: what is wrong.
    """
    make = case.maker()
    options = {"share": case.share, "closed_grad": case.closed_grad}
    made = snr.snr_aver(make, case.rows, case.width, case.inputs, case.outputs, **options)
    _check(mk.snr_aver, aver.formula, made, make, case)


def _without_closed_routes(z: Tensor) -> Tensor:
    """The coding, whose closed routes have no gradient."""
    return torch.where(z == 0, z.detach(), z)


def _open_routes(u: Any, z: Tensor, weight: Any = None, **_: Any) -> list[Tensor]:
    """By PyTorch's operators, of open routes alone."""
    outputs = []
    for i, row in enumerate(z.tolist()):
        total = u[0].new_zeros(u[0].shape[0], u[0].shape[1] if weight is None else weight[i][0].shape[0])
        for j, value in enumerate(row):
            if value != 0:
                total = total + z[i, j] * (u[j] if weight is None else u[j] @ weight[i][j].t())
        outputs.append(total)
    return outputs


def _check(op: Any, formula: Any, made: Case, make: tensors.Maker, case: TransCase | AverCase) -> None:
    if case.special and case.rows:  # of no rows z's gradient is a product of zeros with the weights all the same
        make.put(case.special, make.rng.choice(list(tensors_in([v for k, v in made.arguments.items() if k != "z"]))))
        arguments = {**made.arguments, "closed_grad": False}
        calls.check_special(op, _open_routes, Case(arguments, made.dtype), case.way, case.used)
        return

    def meant(*, z: Tensor, closed_grad: bool, **rest: Any) -> list[Tensor]:
        return list(formula(z=z if closed_grad else _without_closed_routes(z), closed_grad=closed_grad, **rest))

    by_formula = case.way.implementation == "reference"
    meaning = Meaning(meant, meant if by_formula else functools.partial(reference_op, op))
    calls.check(op, meaning, made, case.way, case.used)
