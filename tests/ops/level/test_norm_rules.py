"""Norms: momentum in an ensemble, dtypes that do not go together, and biases of experts that no loss reaches."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import mtlkernels as mk


def test_momentum_in_an_ensemble() -> None:
    """Another than PyTorch's own."""
    x = torch.randn(40, 12)
    models = [mk.nn.MMoE(12, 2, (10, 8), num_experts=3, batch_norm=True).train() for _ in range(3)]
    for model in models:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.momentum = 0.5
    alone = copy.deepcopy(models)
    for model in alone:
        model(x)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    vmap(lambda p, b: functional_call(base, (p, b), (x,))[0])(parameters, buffers)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([dict(model.named_buffers())[name] for model in alone]))


def test_examples_cannot_share_running_statistics() -> None:
    """As with PyTorch's own; nothing is written before it is said."""
    model = mk.nn.MMoE(12, 2, (10, 8), num_experts=3, batch_norm=True).train()
    before = copy.deepcopy(list(model.buffers()))
    with pytest.raises(RuntimeError, match="each would write its statistics to the same running_mean"):
        vmap(lambda x: model(x)[0])(torch.randn(4, 20, 12))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("way", ["direct", "reference", "autocast", "compiled"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_statistics_that_modules_share(momentum: float | None, way: str) -> None:
    torch.manual_seed(0)
    norms: list[nn.Module] = [nn.BatchNorm1d(8, momentum=momentum) for _ in range(2)]
    for name, buffer in norms[0].named_buffers():
        setattr(norms[1], name, buffer)
    weights, x, logits = [torch.randn(8, 8) for _ in range(2)], torch.randn(16, 8) + 1, torch.randn(16, 2)
    plain = copy.deepcopy(norms)

    def level(x: torch.Tensor) -> torch.Tensor:
        return mk.expert_mixture(x, [weights], None, logits, mk.Routing.mmoe(2, 1), norms=[norms])[0]

    run = torch.compile(level, backend="aot_eager") if way == "compiled" else level
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        for _ in range(2):
            with mk.use_backend("reference") if way == "reference" else contextlib.nullcontext():
                run(x)
            for norm, weight in zip(plain, weights, strict=True):
                norm(nn.functional.linear(x, weight))
    for name, buffer in plain[0].named_buffers():
        torch.testing.assert_close(norms[0].get_buffer(name), buffer, rtol=1e-4, atol=1e-4)


def test_means_of_all_batches_that_nobody_counts(backend: str) -> None:
    """Stay what they are, as PyTorch's do."""
    norm = nn.BatchNorm1d(8, momentum=None)
    norm.num_batches_tracked = None
    norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
    x = torch.randn(16, 8)
    with mk.use_backend(backend):
        mk.expert_mixture(x, [[x[:8]]], None, x[:, :1], mk.Routing.mmoe(1, 1), norms=[[norm]])
    norm(x)
    assert (norm.running_mean == 3.0).all() and (norm.running_var == 1.0).all()


def test_statistics_that_are_no_longer_tracked(backend: str) -> None:
    norm, x = nn.BatchNorm1d(8), torch.randn(16, 8)
    norm.track_running_stats = False
    with mk.use_backend(backend):
        mk.expert_mixture(x, [[x[:8]]], None, x[:, :1], mk.Routing.mmoe(1, 1), norms=[[norm]])
    assert (norm.running_mean == 0.0).all() and (norm.running_var == 1.0).all()
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 1.0, None])
@pytest.mark.parametrize("scale", [1e20, float("inf")])
def test_infinite_statistics_stay_as_pytorchs(scale: float, momentum: float | None, compiled: bool) -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=momentum)
    plain, routing = copy.deepcopy(norm), mk.Routing.mmoe(1, 1)

    def call(x: torch.Tensor) -> torch.Tensor:
        logits, options = torch.zeros(len(x), 1), {"norms": [[norm]]}
        return mk.expert_mixture(x, [[linear.weight]], [[linear.bias]], logits, routing, **options)[0]  # type: ignore[arg-type]

    run = torch.compile(call, backend="aot_eager") if compiled else call
    for i in range(3):
        x = torch.randn(64, 4).abs()
        if i == 0:
            x[0] *= scale
        run(x)
        plain(linear(x))
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), buffer, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_in_float64_beside_others(kind: torch.dtype) -> None:
    weights = [[torch.randn(6, 4, dtype=kind) for _ in range(3)]]
    norms = [[nn.BatchNorm1d(6).double().eval() for _ in range(3)]]
    x, logits = torch.randn(5, 4, dtype=kind), torch.randn(5, 6, dtype=kind)
    with torch.no_grad(), pytest.raises(TypeError, match="norms"):
        mk.expert_mixture(x, weights, None, logits, mk.Routing.mmoe(3, 2), norms=norms)


def test_the_bias_of_an_expert_that_no_loss_reaches() -> None:
    """It keeps no gradient, also behind a norm without parameters."""
    weights = [[torch.randn(6, 4) for _ in range(3)]]
    biases = [[torch.randn(6, requires_grad=True) for _ in range(3)]]
    norms = [[nn.BatchNorm1d(6, affine=False).eval() for _ in range(3)]]
    logits, routing = [torch.randn(5, 2), torch.randn(5, 1)], mk.Routing((0, 0, 0), ((0, 1), (2,)))
    outputs = mk.expert_mixture(torch.randn(5, 4), weights, biases, logits, routing, norms=norms)
    outputs[0].sum().backward()
    assert [bias.grad is None for bias in biases[0]] == [False, False, True]
