"""NaN, infinities, subnormal, large and huge numbers: what comes out is what PyTorch's modules make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from tests.ops.level import special_values
from tests.ops.level.special_values import ACTIVATIONS, HUGE, NORMS, ORDINARY, Level, Style

HALVES = pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
INSTRUCTION_SETS = pytest.mark.parametrize("isa", _extension.instruction_sets())
NAN, INF = float("nan"), float("inf")


def check(
    style: Style, dtype: torch.dtype, values: tuple[str, ...] = ORDINARY, grads: tuple[bool, ...] = (True,)
) -> None:
    found = list(special_values.differences(style, dtype, values, grads))
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:10])


# Gates know nothing of the experts' norms; with a norm every other activation is enough, in turns.
STYLES = [(activation, "none", linear_gates) for activation in ACTIVATIONS for linear_gates in (False, True)]
STYLES += [
    (activation, norm, False)
    for i, activation in enumerate(ACTIVATIONS)
    for j, norm in enumerate(norm for norm in NORMS if norm != "none")
    if (i + j) % 2 == 0
]


@pytest.mark.parametrize("activation, norm, linear_gates", STYLES)
def test_float32(activation: str, norm: str, linear_gates: bool, backend: str) -> None:
    with mk.use_backend(backend):
        check(Style(activation, norm, linear_gates), torch.float32)


@HALVES
@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("activation", ["relu", "silu", "prelu"])
def test_other_dtypes(activation: str, norm: str, kind: torch.dtype, backend: str) -> None:
    with mk.use_backend(backend):
        check(Style(activation, norm), kind)


@INSTRUCTION_SETS
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_few_rows_in_bfloat16(rows: int, isa: str) -> None:
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        check(Style("relu", rows=rows), torch.bfloat16, grads=(True, False))


@INSTRUCTION_SETS
@pytest.mark.parametrize("rows", [1, 3, 8, 40, 200])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_instruction_sets(activation: str, rows: int, isa: str) -> None:
    """Few rows, groups of rows with room left in the last, and as many as AMX splits float32 for.

    Sums that overflow depend on their order, which differs; what is huge is tested for AMX, which splits it.
    """
    values = (*ORDINARY, *HUGE) if isa == "amx" and activation == "sigmoid" else ORDINARY
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        check(Style(activation, rows=rows), torch.float32, values, (True, False))


@INSTRUCTION_SETS
@pytest.mark.parametrize("rows", [1, 7, 40, 700])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_one_gate_an_expert(activation: str, rows: int, isa: str) -> None:
    """What its last layer gave is not computed again then, unless something is not finite."""
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        for kind in (torch.float32, torch.float64):
            check(Style(activation, rows=rows, used=1), kind)


@INSTRUCTION_SETS
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
def test_norms_of_instruction_sets(kind: torch.dtype, isa: str) -> None:
    """Not in bfloat16, which rounds a value close to zero to either sign, as an infinite weight then shows."""
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        for norm, rows in (("batch", 40), ("layer", 3), ("layer", 200)):
            check(Style("relu", norm, rows=rows), kind, ("nan", "inf", "-inf"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised inside Dynamo
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(backend: str) -> None:
    level = Level(Style("relu", linear_gates=True), torch.float32)
    level.upstream[0][0, 0] = NAN
    with torch.no_grad():
        level.x[1, 1] = INF
    expected = level.results(fused=False, grad=True)
    with mk.use_backend(backend):
        level.fused = torch.compile(level.fused, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
        got = level.results(fused=True, grad=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, equal_nan=True)


def dropped(x: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The output of a level that is a single expert, the identity with dropout; and the gradient of x."""
    x = x.clone().requires_grad_()
    eye, logits = torch.eye(x.shape[1]), torch.zeros(x.shape[0], 1)
    (y,) = mk.expert_mixture(x, [[eye]], None, [logits], mk.Routing.mmoe(1, 1), activation="none", dropout=rate)
    (grad,) = torch.autograd.grad(y, x, torch.where(x.detach() == 2, NAN, 1.0))
    return y.detach(), grad


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_dropout_is_a_product(rate: float, backend: str) -> None:
    """As in PyTorch, where a dropped value is multiplied by 0: NaN stays, and Inf becomes NaN."""
    x = torch.ones(64, 16)
    x[:, 3] = NAN
    with mk.use_backend(backend):
        y, _ = dropped(x, rate)
        assert y.isnan().all()  # the products with the identity are sums over a row
        x[:, 3] = 2.0
        _, grad = dropped(x, rate)
    assert grad.isnan().all()
