"""Mistakes in the arguments of snr_trans, and in those of its operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtlkernels as mk
from tests import requires

U, W, Z = torch.zeros(2, 5, 3), torch.zeros(4, 2, 6, 3), torch.ones(4, 2)
WEIGHTS = [W[i, j] for i in range(4) for j in range(2)]
GRADS = [torch.zeros(5, 6)] * 4


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((1, W, Z), TypeError, "u must be a tensor .* or a sequence of J tensors.*, got int"),
        ((U[0], W, Z), ValueError, r"u must have shape \[J, B, D_in\], got \[5, 3\]"),
        ((U[0, 0, 0], W, Z), ValueError, r"u must have shape \[J, B, D_in\], got \[\]"),
        ((U[0, 0, 0], [[W[0, 0]]], Z[:1]), ValueError, r"u must have shape \[J, B, D_in\], got \[\]"),
        ((1, [[W[0, 0]]], Z[:1]), TypeError, "u must be a tensor .* or a sequence of J tensors.*, got int"),
        ((U[:0], W, Z), ValueError, "u must hold the output of at least one sub-network"),
        (([], W, Z), ValueError, "u must hold the output of at least one sub-network, got none"),
        (([U[0], U[1, :4]], W, Z), ValueError, r"u\[1\] must have as many rows as u\[0\], 5, got \[4, 3\]"),
        (([U[0], U[1].double()], W, Z), TypeError, r"u\[1\] must have the dtype of u\[0\]"),
        (([U[0], U[1].to("meta")], W, Z), ValueError, r"u\[1\] must be on the device of u\[0\]"),
        ((U.int(), W, Z), TypeError, "u must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((U, None, Z), TypeError, r"weight must be a tensor \[I, J, D_out, D_in\] or a sequence.*, got NoneType"),
        ((U, W[0], Z), ValueError, r"weight must have shape \[I, 2, D_out, 3\], got \[2, 6, 3\]"),
        ((U, W[:, :1], Z), ValueError, r"weight must have shape \[I, 2, D_out, 3\] for this u, got \[4, 1, 6, 3\]"),
        ((U, W[:0], Z), ValueError, r"weight must have shape \[I, 2, D_out, 3\] for this u, got \[0, 2, 6, 3\]"),
        ((U, W.half(), Z), TypeError, "weight must have the dtype of u, torch.float32, got torch.float16"),
        ((U, [], Z), ValueError, "weight must hold matrices for at least one output, got none"),
        ((U, [W[0, 0]], Z), TypeError, r"weight\[0\] must be a sequence of matrices, got Tensor"),
        ((U, [[W[0, 0]]], Z[:1]), ValueError, r"weight\[0\] must hold a matrix for each of 2 tensors in u, got 1"),
        (([U[0], U[1, :, :2]], W, Z), ValueError, r"u\[1\] must have the width of u\[0\], 3, for a stacked weight"),
        (
            (U, [[W[0, 0], W[0, 0, :5]]], Z[:1]),
            ValueError,
            r"weight\[0\]\[1\] must have shape \[6, 3\], rows as weight\[0\]\[0\] and columns as u\[1\], got \[5, 3\]",
        ),
        (
            (U[:1], [[W[:2, :1]]], Z[:2, :1]),
            ValueError,
            r"weight\[0\]\[0\] must have shape \[D_out, 3\], got \[2, 1, 6, 3\]",
        ),
        ((U, W, 1.0), TypeError, r"z must be a tensor \[I, 2\], got float"),
        ((U, W, Z.t()), ValueError, r"z must have shape \[4, 2\], a row for each output.*, got \[2, 4\]"),
        ((U, W, Z[:, 0]), ValueError, r"z must have shape \[I, 2\], got \[4\]"),
        ((U, W, Z.double()), TypeError, "z must be float32 or narrower beside u in torch.float32, got torch.float64"),
        ((U, W, Z.to("meta")), ValueError, "z must be on the device of u, cpu, got meta"),
    ],
)
def test_mistakes(arguments: Any, error: type[Exception], message: str) -> None:
    for wanted in (True, False):  # a gradient, or the short way that serves
        with torch.set_grad_enabled(wanted), pytest.raises(error, match=message):
            mk.snr_trans(*arguments)


def test_mistakes_with_closed_grad() -> None:
    with pytest.raises(TypeError, match="closed_grad must be True or False, got int"):
        mk.snr_trans(U, W, Z, closed_grad=1)  # type: ignore[arg-type]


@requires.cpp_kernels
@pytest.mark.parametrize(
    "direction, arguments, message",
    [
        ("forward", ([], WEIGHTS, Z), "u must hold at least one"),
        ("forward", ([U[0], U[1, :4]], WEIGHTS, Z), r"u\[1\] must have shape \[5, D\], got \[4, 3\]"),
        ("forward", ([U[0], U[1].double()], WEIGHTS, Z), r"u\[1\] must be a dense tensor of Float"),
        ("forward", ([U[0], U[1]], WEIGHTS[:7], Z), "weights must hold 8 matrices, got 7"),
        (
            "forward",
            ([U[0], U[1]], [W[:3]], Z),
            r"weights must have shape \[4, 2, D_out, D_in\], got \[3, 2, 6, 3\]",
        ),
        ("forward", ([U[0], U[1]], [W[..., :2]], Z), r"weights\[0\] must have shape \[6, 3\], got \[6, 2\]"),
        ("forward", ([U[0], U[1]], WEIGHTS, Z[:, :1]), r"z must be a tensor \[I, 2\], got \[4, 1\]"),
        ("forward", ([U[0], U[1]], WEIGHTS, Z.double()), "z must be float32 or narrower"),
        (
            "backward",
            (GRADS[:3], [*U], WEIGHTS, Z, *[True] * 4),
            "grad_outputs must hold a tensor for each of 4",
        ),
        (
            "backward",
            ([*GRADS[:3], torch.zeros(5, 7)], [*U], WEIGHTS, Z, *[True] * 4),
            r"grad_outputs\[3\] must have width 6, got 7",
        ),
    ],
)
def test_the_operator_refuses_what_kernels_cannot_read(direction: str, arguments: Any, message: str) -> None:
    """A direct call of the operator does not pass the checks in Python."""
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(torch.ops.mtlkernels, f"snr_trans_{direction}")(*arguments)
