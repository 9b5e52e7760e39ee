"""Batch norm folded into a linear layer: the numbers, and that they are never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlkernels._convert.folding import fold, forget, may_cache, norm_refusal


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
    return fold(layers[0], layers[1], may_cache())


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
def test_folds_once() -> None:
    layers = pair()
    assert all(a is b for a, b in zip(folded(layers), folded(layers), strict=True))


def in_place(name: str) -> Callable[[Any], None]:
    def change(layers: Any) -> None:
        with torch.no_grad():
            layers.get_parameter(name).mul_(1.5)

    return change


def buffer_in_place(name: str) -> Callable[[Any], None]:
    return lambda layers: layers.get_buffer(name).mul_(1.5)


def load(assign: bool) -> Callable[[Any], None]:
    def change(layers: Any) -> None:
        state = {key: value * 1.5 if value.is_floating_point() else value for key, value in layers.state_dict().items()}
        layers.load_state_dict(state, assign=assign)

    return change


def train(layers: Any) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        layers.train()(torch.randn(20, 9)).square().sum().backward()
        optimizer.step()
        layers.eval()


def see_data(layers: Any) -> None:
    """Only the running statistics change, in place, and PyTorch does not count their versions."""
    layers.train()(torch.randn(20, 9) * 9)
    layers.eval()


def new_data(layers: Any) -> None:
    layers[0].weight.data = layers[0].weight.data * 1.5


def reused_memory(layers: Any) -> None:
    """New values in a tensor that would get the old one's address if that were free."""
    weight = layers[0].weight
    values, address = (weight * 1.5).numpy().copy(), weight.data_ptr()
    weight.data = torch.empty(0)
    candidates = [torch.empty(6, 9) for _ in range(50)]
    chosen = next((c for c in candidates if c.data_ptr() == address), candidates[0])
    chosen.copy_(torch.from_numpy(values))
    weight.data = chosen


def swap_parameter(layers: Any) -> None:
    layers[1].weight = nn.Parameter(layers[1].weight * 1.5)


def alias(layers: Any) -> None:
    """Another parameter over the same memory, as often changed as the one before it."""
    before = layers[1].weight
    after = nn.Parameter(before.data)
    while after._version < before._version:
        after.mul_(1.5)
    assert (after._version, after.data_ptr()) == (before._version, before.data_ptr())
    layers[1].weight = after


def hidden_write(layers: Any) -> None:
    """Nothing counts a write to ``.data``: ``train()`` of a converted module forgets what is folded."""
    layers[0].weight.data.mul_(1.5)
    forget(layers)


CHANGES: dict[str, Callable[[Any], None]] = {
    **{name: in_place(name) for name in ("0.weight", "0.bias", "1.weight", "1.bias")},
    **{name: buffer_in_place(name) for name in ("1.running_mean", "1.running_var")},
    "load_state_dict": load(assign=False),
    "load_state_dict(assign=True)": load(assign=True),
    "double": lambda layers: layers.double(),
    "bfloat16": lambda layers: layers.bfloat16(),
    "a training step": train,
    "statistics alone": see_data,
    "new data": new_data,
    "new data at the old address": reused_memory,
    "another parameter": swap_parameter,
    "another parameter over the same memory": alias,
    "data in place": hidden_write,
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_is_never_stale(name: str) -> None:
    layers = pair()
    before = folded(layers)
    CHANGES[name](layers)
    assert_right(layers)
    after = folded(layers)
    assert any(not torch.equal(a.double(), b.double()) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_copies_and_pickles_fold_their_own() -> None:
    layers = pair()
    folded(layers)
    other = copy.deepcopy(layers)
    other[1].running_var.mul_(2)
    assert_right(other)
    assert_right(layers)


def test_gradients_reach_every_parameter() -> None:
    layers = pair(dtype=torch.float64)
    with torch.no_grad():
        folded(layers)  # what is kept must not serve where a gradient is wanted
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
    with torch.no_grad():
        folded(layers)
    found, expected = (torch.func.grad(loss)(state, by_fold) for by_fold in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_an_ensemble_by_vmap() -> None:
    layers = pair(dtype=torch.float64)
    folded(layers)
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
        layers[0].weight.mul_(2)  # an inference tensor counts no versions
        assert_right(layers)
    layers = pair()
    with torch.inference_mode():
        folded(layers)
    with torch.no_grad():
        assert not folded(layers)[0].is_inference()
        assert_right(layers)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm1d(1), "BatchNorm1d of [1] features after a layer of 6"),
        (nn.LayerNorm((2, 3)), "LayerNorm of [2, 3] features after a layer of 6"),
    ],
)
def test_refusals(norm: nn.Module, reason: str) -> None:
    assert norm_refusal(nn.Linear(9, 6), norm) == reason
    assert norm_refusal(nn.Linear(9, 6), nn.BatchNorm1d(6)) is None
    assert norm_refusal(nn.Linear(9, 6), nn.LayerNorm(6)) is None
