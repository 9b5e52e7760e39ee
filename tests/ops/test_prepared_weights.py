"""Weights that C++ prepares once for several calls: what is kept is never used for weights that have changed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason="no C++ kernels")

ROUTING = mk.Routing.mmoe(3, 2)
ROWS = 80


def make_level(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [[randn(48, 40) / 6 for _ in range(3)], [randn(33, 48) / 7 for _ in range(3)]]
    return randn(ROWS, 40), weights, randn(ROWS, 6)


def serve(x: Tensor, weights: Sequence[Sequence[Tensor]], logits: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return mk.expert_mixture(x, weights, None, logits, ROUTING)


def assert_fresh(x: Tensor, weights: Sequence[Sequence[Tensor]], logits: Tensor) -> None:
    """What is served comes from the weights as they are now: copies, which nobody has seen, give the same bits."""
    found = serve(x, weights, logits)
    expected = serve(x, [[w.detach().clone() for w in layer] for layer in weights], logits)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def grow(weight: Tensor) -> None:
    weight.mul_(1.5)


def write_past_the_version(weight: Tensor) -> None:
    weight.data.mul_(1.5)


def swap(weight: Tensor) -> None:
    weight.data = weight.detach().clone() * 1.5


def write_a_view(weight: Tensor) -> None:
    weight[7:9].zero_()


CHANGES = (grow, write_past_the_version, swap, write_a_view)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", (torch.float32, torch.bfloat16), ids=str)
def test_a_changed_weight_is_prepared_anew(kind: torch.dtype, change: Callable[[Tensor], None]) -> None:
    x, weights, logits = make_level(kind)
    before = [serve(x, weights, logits) for _ in range(3)]
    assert all(torch.equal(a, b) for out in before[1:] for a, b in zip(out, before[0], strict=True))
    with torch.no_grad():
        change(weights[1][2])
    assert not torch.equal(serve(x, weights, logits)[0], before[-1][0])
    for _ in range(3):
        assert_fresh(x, weights, logits)


def test_memory_that_is_used_again_is_another_weight() -> None:
    for seed in range(8):
        x, weights, logits = make_level(torch.bfloat16, seed)
        for _ in range(3):
            assert_fresh(x, weights, logits)
        del weights
        gc.collect()


def test_training_between_calls() -> None:
    x, weights, logits = make_level(torch.float32)
    parameters = [[torch.nn.Parameter(w) for w in layer] for layer in weights]
    optimizer = torch.optim.SGD([w for layer in parameters for w in layer], lr=0.1)
    for _ in range(4):
        for _ in range(3):
            assert_fresh(x, parameters, logits)
        optimizer.zero_grad()
        torch.stack(mk.expert_mixture(x, parameters, None, logits, ROUTING)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("share", ("share_memory", "numpy"))
def test_memory_that_others_write_to(share: str) -> None:
    x, weights, logits = make_level(torch.float32)
    if share == "numpy":
        arrays = [[w.numpy().copy() for w in layer] for layer in weights]
        weights = [[torch.from_numpy(array) for array in layer] for layer in arrays]
    else:
        weights = [[w.share_memory_() for w in layer] for layer in weights]
    for _ in range(3):
        serve(x, weights, logits)
    before = serve(x, weights, logits)[0]
    # One value, past the version and past every sample.
    weights[0][0].numpy()[5, 3] += 100.0
    assert (serve(x, weights, logits)[0] - before).abs().max() > 1
    expected = mk.expert_mixture(
        x.double(), [[w.double() for w in layer] for layer in weights], None, logits.double(), ROUTING
    )
    torch.testing.assert_close(serve(x, weights, logits)[0].double(), expected[0], rtol=1e-4, atol=1e-4)


def test_every_instruction_set_prepares_its_own() -> None:
    x, weights, logits = make_level(torch.bfloat16)
    for _ in range(2):
        for name in _extension.instruction_sets():
            with _extension.instruction_set(name):
                for _ in range(3):
                    assert_fresh(x, weights, logits)
