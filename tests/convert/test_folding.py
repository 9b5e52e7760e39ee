"""Batch norm folded into linear layers: the numbers, and that gradients and transforms go through.

That nothing of it is kept is tested in tests/test_never_stale.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mtlkernels.ops._folding import fold
from mtlkernels.ops._fusing import norm_refusal
from tests.ops.agreement import assert_as_exact


def pair(affine: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A linear layer and its batch norm, with statistics that have seen data."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(9, 6, bias=bias), nn.BatchNorm1d(6, affine=affine, eps=1e-3)).double()
    for _ in range(5):
        layers(torch.randn(40, 9, dtype=torch.float64) * 3 + 1)
    if affine:
        nn.init.normal_(layers[1].weight)
        nn.init.normal_(layers[1].bias)
    return layers.to(dtype).eval()


def folded(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    (weight,), (bias,) = fold([layers[0].weight], [layers[0].bias], [layers[1]])
    return weight, bias


def assert_right(layers: nn.Sequential) -> None:
    """What is folded is what the layers compute now, to float32 or float64."""
    exact = copy.deepcopy(layers).double()
    x = torch.randn(30, 9, dtype=torch.float64)
    expected = exact(x)
    found = nn.functional.linear(x.to(layers[0].weight.dtype), *folded(layers)).double()
    library = layers(x.to(layers[0].weight.dtype)).double()
    eps = torch.finfo(layers[0].weight.dtype).eps
    assert (found - expected).norm() <= 3 * (library - expected).norm() + 8 * eps * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_agrees_with_the_layers(affine: bool, bias: bool, dtype: torch.dtype) -> None:
    layers = pair(affine, bias, dtype)
    before = copy.deepcopy(layers.state_dict())
    assert_right(layers)
    assert all(torch.equal(before[key], value) for key, value in layers.state_dict().items())
    assert all(t.dtype == dtype for t in folded(layers))


@torch.no_grad()
def test_a_layer_of_experts_at_once() -> None:
    """Some with a bias, some with parameters of their norm, of several dtypes."""
    experts = [pair(affine, bias) for affine, bias in ((True, True), (False, True), (True, False), (False, False))]
    weights, biases = fold([e[0].weight for e in experts], [e[0].bias for e in experts], [e[1] for e in experts])
    x = torch.randn(30, 9)
    for expert, weight, bias in zip(experts, weights, biases, strict=True):
        exact = copy.deepcopy(expert).double()(x.double())
        assert_as_exact(nn.functional.linear(x, weight, bias), exact, expert(x))
    mixed = [pair(), pair().bfloat16()]
    found, _ = fold([e[0].weight for e in mixed], [e[0].bias for e in mixed], [e[1] for e in mixed])
    assert [weight.dtype for weight in found] == [torch.float32, torch.bfloat16]


def test_gradients_reach_every_parameter() -> None:
    layers = pair(dtype=torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64)
    parameters = list(layers.parameters())
    expected = torch.autograd.grad(layers(x).square().sum(), parameters)
    found = torch.autograd.grad(nn.functional.linear(x, *folded(layers)).square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_under_torch_func() -> None:
    layers = pair(dtype=torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64)

    def loss(state: dict[str, Tensor], by_fold: bool) -> Tensor:
        class Forward(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = layers

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x, *folded(self.layers)) if by_fold else self.layers(x)

        return torch.func.functional_call(Forward(), {f"layers.{k}": v for k, v in state.items()}, (x,)).square().sum()

    state = {name: p.detach() for name, p in layers.named_parameters()}
    found, expected = (torch.func.grad(loss)(state, by_fold) for by_fold in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_an_ensemble_by_vmap() -> None:
    layers = pair(dtype=torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64)
    factors = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    state = {name: torch.stack([p * f for f in factors]) for name, p in layers.named_parameters()}

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, *folded(self.layers))

    model = Folded()

    def run(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {f"layers.{name}": value for name, value in state.items()}, (x,))

    found = torch.func.vmap(run)(state)
    for i in range(3):
        one = {name: value[i] for name, value in state.items()}
        torch.testing.assert_close(found[i], torch.func.functional_call(layers, one, (x,)), rtol=1e-12, atol=1e-12)
    assert_right(layers)


def test_inference_mode() -> None:
    with torch.inference_mode():
        layers = pair()
        assert_right(layers)
        layers[0].weight.mul_(2)
        assert_right(layers)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm1d(1), "BatchNorm1d of [1] features after a layer of 6"),
        (nn.LayerNorm((2, 3)), "LayerNorm of [2, 3] features after a layer of 6"),
    ],
)
def test_refusals(norm: nn.Module, reason: str) -> None:
    assert norm_refusal(torch.empty(6, 9), norm) == reason
    assert norm_refusal(torch.empty(6, 9), nn.BatchNorm1d(6)) is None
    assert norm_refusal(torch.empty(6, 9), nn.LayerNorm(6)) is None
