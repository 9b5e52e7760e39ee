"""Checks of snr_trans's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels.ops._checks import as_sequence, check_like, check_tensor, shape_of

_WHAT = "a tensor [I, J, D_out, D_in] or a sequence of I sequences of J matrices"


def check_weight(weight: Any, inputs: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The weights in the operator's form, one stacked tensor or I * J matrices, and I."""
    if isinstance(weight, Tensor):
        return [_check_stacked(weight, inputs)], weight.shape[0]
    rows = [as_sequence(f"weight[{i}]", row, "a sequence of matrices") for i, row in enumerate(_rows(weight))]
    for i, row in enumerate(rows):
        if len(row) != len(inputs):
            raise ValueError(f"weight[{i}] must hold a matrix for each of {len(inputs)} tensors in u, got {len(row)}")
        for j, (matrix, x) in enumerate(zip(row, inputs, strict=True)):
            name = f"weight[{i}][{j}]"
            check_tensor(name, matrix, 2, f"[D_out, {x.shape[1]}]")
            check_like(name, matrix, "u", x)
            if matrix.shape[0] != row[0].shape[0] or matrix.shape[1] != x.shape[1]:
                raise ValueError(
                    f"{name} must have shape [{row[0].shape[0]}, {x.shape[1]}], rows as weight[{i}][0] and columns as"
                    f" u[{j}], got {shape_of(matrix)}"
                )
    return [matrix for row in rows for matrix in row], len(rows)


def _rows(weight: Any) -> Sequence[Any]:
    rows = as_sequence("weight", weight, _WHAT)
    if not rows:
        raise ValueError("weight must hold matrices for at least one output, got none")
    return rows


def _check_stacked(weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    width = inputs[0].shape[1]
    shape = f"[I, {len(inputs)}, D_out, {width}]"
    check_tensor("weight", weight, 4, shape)
    check_like("weight", weight, "u", inputs[0])
    if weight.shape[0] == 0 or weight.shape[1] != len(inputs) or weight.shape[3] != width:
        raise ValueError(f"weight must have shape {shape} for this u, got {shape_of(weight)}")
    for j, x in enumerate(inputs):
        if x.shape[1] != width:
            raise ValueError(
                f"u[{j}] must have the width of u[0], {width}, for a stacked weight, got {shape_of(x)};"
                " pass a sequence of sequences of matrices for sub-networks of different widths"
            )
    return weight
