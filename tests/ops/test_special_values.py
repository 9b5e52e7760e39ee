"""NaN, infinities, denormal, large and huge numbers: what comes out is what PyTorch's modules make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from tests.ops import special_values
from tests.ops.special_values import ACTIVATIONS, HUGE, NORMS, ORDINARY, Level, Style

OP = "expert_mixture"
HALVES = pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
INSTRUCTION_SETS = pytest.mark.parametrize("isa", _extension.instruction_sets())
NAN, INF = float("nan"), float("inf")


def check(
    style: Style, dtype: torch.dtype, values: tuple[str, ...] = ORDINARY, grads: tuple[bool, ...] = (True,)
) -> None:
    found = list(special_values.differences(style, dtype, values, grads))
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:10])


# Gates know nothing of the experts' norms.
@pytest.mark.parametrize(
    ("norm", "linear_gates"), [*((norm, False) for norm in NORMS), ("none", True)], ids=[*NORMS, "gate layers"]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
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
@pytest.mark.parametrize("rows", [1, 3, 40, 200])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_instruction_sets(activation: str, rows: int, isa: str) -> None:
    """Few rows, groups of rows with room left in the last, and as many as AMX splits float32 for.

    Sums that overflow depend on their order, which differs; what is huge is tested for AMX, which splits it.
    """
    values = (*ORDINARY, *HUGE) if isa == "amx" and activation == "sigmoid" else ORDINARY
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        check(Style(activation, rows=rows), torch.float32, values, (True, False))


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


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_gated_mixture(value: float, dtype: torch.dtype, backend: str) -> None:
    """A share of exactly 0 times an infinite expert is NaN, and logits that are all -Inf have no softmax."""
    routing = mk.Routing((0, 0, 0), ((0, 1, 2), (1, 0)))
    for place in ("experts", "logits", "upstream", "a share of 0"):
        experts = torch.randn(7, 3, 5, dtype=dtype)
        logits, upstream = torch.randn(7, 3, dtype=dtype), torch.randn(7, 5, dtype=dtype)
        {"experts": experts[2], "logits": logits, "upstream": upstream}.get(place, experts[1])[1:2] = value
        logits[3, 0] = -INF
        experts, logits = experts.requires_grad_(), logits.requires_grad_()
        second = torch.randn(7, 2, dtype=dtype)
        expected = [
            (own.softmax(1).unsqueeze(2) * experts[:, list(gate)]).sum(1)
            for gate, own in zip(routing.gate_experts, (logits, second), strict=True)
        ]
        with mk.use_backend(backend):
            got = mk.gated_mixture(experts, [logits, second], routing)
            grads = torch.autograd.grad(got, [experts, logits], [upstream, upstream])
        wanted = torch.autograd.grad(expected, [experts, logits], [upstream, upstream])
        for found, right in zip((*got, *grads), (*expected, *wanted), strict=True):
            assert torch.equal(special_values.kinds(found), special_values.kinds(right)), place


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_snr(value: float, backend: str) -> None:
    """Routes that are open; a closed one takes no part, whatever its sub-network and weight hold."""
    z = torch.tensor([[0.5, 1.0, 0.0], [0.25, 0.0, 1.0]])
    for place in (
        "u",
        "weight",
        "upstream",
        *(["z"] if value != value else []),
    ):  # z, which is folded, is never infinite
        u, w = [torch.randn(7, 5) for _ in range(3)], torch.randn(2, 3, 5, 5)
        upstream, open_z = torch.randn(7, 5), z.clone()
        {"u": u[0], "weight": w[0, 0], "upstream": upstream, "z": open_z}[place].view(-1)[0] = value
        leaves = [t.requires_grad_() for t in (*u, w)]
        for op, term in (
            (lambda: mk.snr_trans(u, w, open_z, closed_grad=False), lambda i, j: u[j] @ w[i, j].T),  # noqa: B023
            (lambda: mk.snr_aver(u, open_z, closed_grad=False), lambda i, j: u[j]),  # noqa: B023
        ):
            expected = [sum(open_z[i, j] * term(i, j) for j in range(3) if z[i, j] != 0) for i in range(2)]
            with mk.use_backend(backend):
                got = op()
                grads = torch.autograd.grad(got, leaves, [upstream, upstream], allow_unused=True)
            wanted = torch.autograd.grad(expected, leaves, [upstream, upstream], allow_unused=True)
            for found, right in zip((*got, *grads), (*expected, *wanted), strict=True):
                if found is not None and right is not None:
                    assert torch.equal(special_values.kinds(found), special_values.kinds(right)), place


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_hard_concrete_and_its_penalty(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value, 0.5], dtype=dtype, requires_grad=True)
    plain = (torch.sigmoid(x) * 1.2 - 0.1).clamp(0, 1)
    penalty = torch.sigmoid(x - 2 / 3 * torch.tensor(0.1 / 1.1).log().to(dtype)).sum()
    for got, expected in ((mk.hard_concrete(x), plain), (mk.l0_penalty(x), penalty)):
        pair = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
        assert torch.equal(special_values.kinds(got), special_values.kinds(expected))
        assert torch.equal(special_values.kinds(pair[0]), special_values.kinds(pair[1]))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pcgrad_projects_the_other_tasks(value: float, backend: str) -> None:
    """One task's NaN or infinity stays in its gradient: a conflict of two others is repaired as without it."""
    grads = [torch.tensor(g) for g in ([1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, value])]
    order = torch.tensor([[1], [0], [0]])
    projected = [grads[0] + grads[1] / 2, grads[1] + grads[0], grads[2]]
    with mk.use_backend(backend):
        got = mk.pcgrad([[g] for g in grads], order=torch.cat([order, torch.tensor([[2], [2], [1]])], 1))[0]
    expected = sum(projected)
    torch.testing.assert_close(got[:2], expected[:2])
    assert got[2].isnan() if value != value else got[2] == value
