"""hard_concrete and l0_penalty against their formulas, also where they saturate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mtlkernels as mk
from tests.ops.agreement import assert_as_exact, kinds

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def exact(
    x: float, u: float | None, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> tuple[float, float]:
    """z and its derivative in ``log_alpha``, by Python's float arithmetic."""
    slope = 1.0
    if u is not None:
        x, slope = (math.log(u) - math.log1p(-u) + x) / beta, 1 / beta
    s = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    z = s * (zeta - gamma) + gamma
    inside = 0 <= z <= 1
    return min(max(z, 0.0), 1.0), slope * s / (1 + math.exp(x)) * (zeta - gamma) if inside and x < 700 else 0.0


LOG_ALPHAS = [-40.0, -5.0, -2.0, -0.7, 0.0, 0.3, 1.0, 2.0, 5.0, 40.0]
NOISE = [1e-37, 1e-6, 0.02, 0.1, 0.5, 0.75, 0.98, 1 - 2**-24]


@pytest.mark.parametrize("noise", [None, *NOISE])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_values_and_gradients(noise: float | None, wide: torch.dtype) -> None:
    log_alpha = torch.tensor(LOG_ALPHAS, dtype=wide, requires_grad=True)
    u = None if noise is None else torch.full_like(log_alpha, noise).detach()
    z = mk.hard_concrete(log_alpha, u)
    (grad,) = torch.autograd.grad(z.sum(), log_alpha)
    expected = [exact(x, None if u is None else float(u[0])) for x in log_alpha.tolist()]
    logit = log_alpha if u is None else (u.log() - (-u).log1p() + log_alpha) / BETA
    usual = (torch.sigmoid(logit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    (usual_grad,) = torch.autograd.grad(usual.sum(), log_alpha)
    assert_as_exact((z, grad), torch.tensor(expected, dtype=torch.float64).unbind(1), (usual, usual_grad))
    assert z.min() >= 0 and z.max() <= 1


@pytest.mark.parametrize("beta, gamma, zeta", [(0.5, -0.3, 1.2), (1.0, -0.01, 1.5)])
def test_other_parameters(beta: float, gamma: float, zeta: float) -> None:
    log_alpha = torch.tensor(LOG_ALPHAS, dtype=torch.float64)
    u = torch.full_like(log_alpha, 0.3)
    z = mk.hard_concrete(log_alpha, u, beta=beta, gamma=gamma, zeta=zeta)
    expected = torch.tensor([exact(x, 0.3, beta, gamma, zeta)[0] for x in LOG_ALPHAS], dtype=torch.float64)
    torch.testing.assert_close(z, expected)
    penalty = mk.l0_penalty(log_alpha, beta=beta, gamma=gamma, zeta=zeta)
    expected = torch.sigmoid(log_alpha - beta * math.log(-gamma / zeta)).sum()
    torch.testing.assert_close(penalty, expected)


def test_gradients_near_one_where_the_clamp_begins_there() -> None:
    """s * (1 - s) has lost most digits of 1 - s there."""
    log_alpha = torch.tensor([8.0, 10.0, 12.0, 13.0], requires_grad=True)
    zeta = 1 + 1e-6
    (grad,) = torch.autograd.grad(mk.hard_concrete(log_alpha, zeta=zeta).sum(), log_alpha)
    expected = [exact(x, None, zeta=zeta)[1] for x in log_alpha.tolist()]
    assert all(expected)
    torch.testing.assert_close(grad.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_ends_of_the_noise_are_finite(dtype: torch.dtype) -> None:
    """torch.rand can return 0, and a narrow dtype rounds to 1."""
    log_alpha = torch.tensor([-40.0, 0.0, 40.0], dtype=dtype, requires_grad=True)
    for end in (0.0, 1.0):
        noise = torch.full_like(log_alpha, end).requires_grad_()
        z = mk.hard_concrete(log_alpha, noise)
        grads = torch.autograd.grad(z.sum(), (log_alpha, noise))
        assert z.dtype == dtype and z[1] == end
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_the_probability_of_an_open_route_is_the_penalty() -> None:
    """P(z > 0) by sampling, against l0_penalty of each entry; both ends of z have mass."""
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200_000, 4, generator=generator)
    z = mk.hard_concrete(log_alpha.expand_as(noise), noise)
    expected = torch.stack([mk.l0_penalty(x) for x in log_alpha])
    # Four standard deviations of a share of so many samples, at most.
    torch.testing.assert_close((z > 0).float().mean(0), expected, atol=2 / 200_000**0.5, rtol=0)
    assert ((z == 1).float().mean(0) > 0.001).all()


def test_penalty_and_its_gradient_where_it_saturates() -> None:
    log_alpha = torch.tensor([-40.0, -1.0, 0.0, 40.0], requires_grad=True)
    (grad,) = torch.autograd.grad(mk.l0_penalty(log_alpha), log_alpha)
    shifted = log_alpha.detach().double() - BETA * math.log(-GAMMA / ZETA)
    # Relative to each element: a budget of the largest would pass over those that are nearly zero.
    torch.testing.assert_close(grad.double(), torch.sigmoid(shifted) * torch.sigmoid(-shifted), rtol=2e-5, atol=0)
    assert mk.l0_penalty(log_alpha[:1]) > 0


def test_finite_differences() -> None:
    """Away from the clamp's kinks."""
    generator = torch.Generator().manual_seed(3)
    log_alpha = torch.randn(3, 4, dtype=torch.float64, generator=generator).mul_(0.3).requires_grad_()
    noise = torch.rand(3, 4, dtype=torch.float64, generator=generator).mul_(0.4).add_(0.3).requires_grad_()
    for function, inputs in (
        (mk.hard_concrete, (log_alpha, noise)),
        (mk.hard_concrete, (log_alpha,)),
        (mk.l0_penalty, (log_alpha,)),
    ):
        gradcheck(function, inputs, check_batched_grad=True)
        gradgradcheck(function, inputs, check_batched_grad=True)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    gradcheck(mk.hard_concrete, (zero,))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compile_and_func_transforms() -> None:
    log_alpha, noise = torch.randn(3, 4), torch.rand(3, 4)

    def loss(log_alpha: Tensor, noise: Tensor) -> Tensor:
        return mk.hard_concrete(log_alpha, noise).square().sum() + mk.l0_penalty(log_alpha)

    plain = torch.func.grad(loss)(log_alpha, noise)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(log_alpha, noise), plain)
    batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(log_alpha, torch.stack([noise, 1 - noise]))
    torch.testing.assert_close(batched[0], plain)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (([0.5],), {}, TypeError, "log_alpha must be a tensor, got list"),
        ((torch.zeros(2, dtype=torch.int64),), {}, TypeError, "log_alpha must be float32.*got torch.int64"),
        ((torch.zeros(2), 0.5), {}, TypeError, "noise must be a tensor, got float"),
        ((torch.zeros(2), torch.zeros(3)), {}, ValueError, r"noise must have the shape of log_alpha, \[2\], got \[3\]"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), {}, ValueError, "noise must be on the device of log_alpha"),
        ((torch.zeros(2),), {"beta": 0}, ValueError, "beta must be positive and finite, got 0"),
        ((torch.zeros(2),), {"beta": "1"}, TypeError, "beta must be a number, got str"),
        ((torch.zeros(2),), {"gamma": 0.0}, ValueError, "gamma must be negative and finite, got 0.0"),
        ((torch.zeros(2),), {"zeta": 1.0}, ValueError, "zeta must be above 1 and finite, got 1.0"),
    ],
)
def test_bad_input(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.hard_concrete(*arguments, **options)
    if len(arguments) == 1:
        with pytest.raises(error, match=message):
            mk.l0_penalty(*arguments, **options)


def test_memory_that_is_gone() -> None:
    """PyTorch reads it without asking, which ends the process."""
    log_alpha, noise = torch.zeros(2), torch.full((2,), 0.5)
    noise.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="noise must have 8 bytes of memory, got 0"):
        mk.hard_concrete(log_alpha, noise)
    with pytest.raises(ValueError, match="log_alpha must have 8 bytes of memory, got 0"):
        mk.l0_penalty(noise)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value, 0.5], dtype=dtype, requires_grad=True)
    plain = (torch.sigmoid(x) * 1.2 - 0.1).clamp(0, 1)
    penalty = torch.sigmoid(x - 2 / 3 * torch.tensor(0.1 / 1.1).log().to(dtype)).sum()
    for got, expected in ((mk.hard_concrete(x), plain), (mk.l0_penalty(x), penalty)):
        pair = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
        assert torch.equal(kinds(got), kinds(expected))
        assert torch.equal(kinds(pair[0]), kinds(pair[1]))
