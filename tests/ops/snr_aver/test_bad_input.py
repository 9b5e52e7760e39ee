"""Mistakes in the arguments of snr_aver, and in those of its operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtlkernels as mk
from tests import requires

U, Z = torch.zeros(2, 5, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([U[0], U[1, :, :2]], Z), ValueError, r"u\[1\] must have the width of u\[0\], 3, got \[5, 2\]"),
        ((U[0, 0, 0], Z), ValueError, r"u must have shape \[J, B, D_in\], got \[\]"),
        ((U, Z[:, :1]), ValueError, r"z must have shape \[I, 2\].*, got \[4, 1\]"),
        ((U, Z[:0]), ValueError, r"z must have shape \[I, 2\].*, got \[0, 2\]"),
        ((U, Z.long()), TypeError, "z must be float32, bfloat16, float16 or float64, got torch.int64"),
    ],
)
def test_mistakes(arguments: Any, error: type[Exception], message: str) -> None:
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), pytest.raises(error, match=message):
            mk.snr_aver(*arguments)


def test_mistakes_with_closed_grad() -> None:
    with pytest.raises(TypeError, match="closed_grad must be True or False, got int"):
        mk.snr_aver(U, Z, closed_grad=1)  # type: ignore[arg-type]


@requires.cpp_kernels
@pytest.mark.parametrize(
    "direction, arguments, message",
    [
        ("forward", ([U[0], U[1, :, :2]], Z), r"u\[1\] must have shape \[5, 3\] as u\[0\], got width 2"),
        ("backward", ([U[0]] * 3, [*U], Z, True, True, True), "grad_outputs must hold a tensor for each of 4"),
    ],
)
def test_the_operator_refuses_what_kernels_cannot_read(direction: str, arguments: Any, message: str) -> None:
    """A direct call of the operator does not pass the checks in Python."""
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(torch.ops.mtlkernels, f"snr_aver_{direction}")(*arguments)
