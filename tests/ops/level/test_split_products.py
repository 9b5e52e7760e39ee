"""float32 and float16 by AMX: products of numbers that are split into bfloat16 planes (csrc/cpu/gemm/pair_engine.h)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests import requires

# "split" does the same without AMX, in a build with CMAKE_ARGS=-DMTLK_SPLIT=ON.
pytestmark = requires.instruction_set("amx", "split", what="AMX")

ROUTING = mk.Routing.mmoe(3, 2)
ROWS = 300  # more than the fewest for which the split pays


def level(dtype: torch.dtype, width: int, scale: float, rows: int = ROWS) -> tuple[Tensor, list[Tensor], Tensor]:
    x = torch.randn(rows, width) * scale
    weights = [torch.randn(3, 70, width) / width**0.5, torch.randn(3, 33, 70) / 70**0.5]
    return x.to(dtype), [w.to(dtype) for w in weights], torch.randn(rows, 6)


def run(x: Tensor, weights: list[Tensor], logits: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of inputs and weights; no kinks, so that errors are those of the products."""
    x = x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in weights]
    outputs = mk.expert_mixture(x, weights, None, logits, ROUTING, activation="none")
    weight = torch.linspace(-1, 1, outputs[0].shape[1], dtype=x.dtype)
    loss = sum(((y / y.detach().abs().max()) * weight).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *weights])]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((f.double() - e).pow(2).mean().sqrt() / e.pow(2).mean().sqrt()).item()
        for f, e in zip(found, exact, strict=True)
    ]


def errors_of_both(x: Tensor, weights: list[Tensor], logits: Tensor) -> tuple[list[float], list[float]]:
    """Those of the C++ kernels and of the reference."""
    exact = run(x.double(), [w.double() for w in weights], logits)
    found = []
    for name in ("cpp", "reference"):
        with mk.use_backend(name):
            found.append(errors(run(x, weights, logits), exact))
    return found[0], found[1]


# With 48 rows the forward pass alone splits its weights.
@pytest.mark.parametrize(
    ("rows", "width", "scale"),
    [*((ROWS, width, scale) for width in (32, 417, 2048) for scale in (1e-25, 1e-8, 1.0, 1e15)), (48, 417, 1.0)],
)
def test_as_exact_as_float32(rows: int, width: int, scale: float) -> None:
    x, weights, logits = level(torch.float32, width, scale, rows)
    split, plain = errors_of_both(x, weights, logits)
    assert all(ours <= 2 * theirs for ours, theirs in zip(split, plain, strict=True)), (split, plain)


def test_float16() -> None:
    x, weights, logits = level(torch.float16, 417, 1.0)
    split, plain = errors_of_both(x, weights, logits)
    assert all(ours <= 1.2 * theirs for ours, theirs in zip(split, plain, strict=True)), (split, plain)


def test_float16_where_pairs_of_inputs_cancel() -> None:
    """The product of the last planes is a millionth of a term, but of a sum that cancels it is a hundredth."""
    x, weights, logits = level(torch.float16, 416, 1.0)
    x[:, 1::2], weights[0][..., 1::2] = x[:, ::2], weights[0][..., ::2].nextafter(weights[0].new_tensor(9.0)).neg()
    split, plain = errors_of_both(x, weights, logits)
    assert all(ours <= 1.2 * theirs for ours, theirs in zip(split, plain, strict=True)), (split, plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible_and_in_its_row(value: float) -> None:
    x, weights, logits = level(torch.float32, 64, 1.0)
    x[17, 5] = value
    with mk.use_backend("cpp"), torch.no_grad():
        outputs = mk.expert_mixture(x, weights, None, logits, ROUTING, activation="none")
    for y in outputs:
        finite = torch.isfinite(y).all(dim=1)
        assert not torch.isfinite(y[17]).any()
        assert finite.sum() == ROWS - 1
