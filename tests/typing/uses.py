"""Typical uses of the package, with the types that mypy and pyright have to find; ``test_uses.py`` runs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import mtlkernels as mk

ROUTING = mk.Routing.mmoe(num_experts=2, num_tasks=2)
X, LOGITS = torch.ones(3, 4), [torch.ones(3, 2), torch.ones(3, 2)]


def ops() -> None:
    assert_type(ROUTING, mk.Routing)
    weights = [[torch.ones(5, 4), torch.ones(5, 4)]]
    assert_type(mk.expert_mixture(X, weights, None, LOGITS, ROUTING), tuple[Tensor, ...])
    biases = [torch.ones(2, 5)]
    stacked = [torch.ones(2, 5, 4)]
    assert_type(mk.expert_mixture([X], stacked, biases, LOGITS, ROUTING, activation="gelu"), tuple[Tensor, ...])
    assert_type(mk.gated_mixture(torch.ones(3, 2, 5), LOGITS, ROUTING), tuple[Tensor, ...])
    z = mk.hard_concrete(torch.zeros(2, 2))
    assert_type(z, Tensor)
    assert_type(mk.l0_penalty(torch.zeros(2, 2)), Tensor)
    assert_type(mk.snr_trans([X, X], torch.ones(2, 2, 5, 4), z), tuple[Tensor, ...])
    assert_type(mk.snr_aver([X, X], z), tuple[Tensor, ...])


def lists_of_modules() -> None:
    """What models hold their parameters and norms in, and lists of indices."""
    routing = mk.Routing([0, 0], [[0, 1], [1]])
    assert_type(routing.gate_experts, tuple[tuple[int, ...], ...])
    weights = nn.ParameterList([nn.Parameter(torch.ones(2, 5, 4))])
    biases = nn.ParameterList([nn.Parameter(torch.ones(2, 5))])
    slopes = nn.ParameterList([nn.Parameter(torch.ones(2, 1))])
    gates = nn.ParameterList([nn.Parameter(torch.ones(size, 4)) for size in (2, 1)])
    gate_norms = nn.ModuleList([nn.BatchNorm1d(size).eval() for size in (2, 1)])
    norms = nn.ModuleList([nn.ModuleList([nn.LayerNorm(5), nn.LayerNorm(5)])])
    mixed = mk.expert_mixture(
        X,
        weights,
        biases,
        None,
        routing,
        activation="prelu",
        slopes=slopes,
        norms=norms,
        gate_weights=gates,
        gate_biases=[None, torch.ones(1)],
        gate_norms=gate_norms,
    )
    assert_type(mixed, tuple[Tensor, ...])
    by_expert = [nn.ParameterList([nn.Parameter(torch.ones(5, 4)) for _ in range(2)])]
    logits = nn.ParameterList([nn.Parameter(torch.ones(3, size)) for size in (2, 1)])
    layers = [nn.ModuleList([nn.BatchNorm1d(5), nn.BatchNorm1d(5)])]
    assert_type(mk.expert_mixture(X, by_expert, None, logits, routing, norms=layers), tuple[Tensor, ...])
    assert_type(mk.gated_mixture(torch.ones(3, 2, 5), logits, routing), tuple[Tensor, ...])
    inputs = nn.ParameterList([nn.Parameter(X), nn.Parameter(X)])
    matrices = [nn.ParameterList([nn.Parameter(torch.ones(5, 4)) for _ in range(2)])]
    assert_type(mk.snr_trans(inputs, matrices, torch.ones(1, 2)), tuple[Tensor, ...])
    assert_type(mk.snr_aver(inputs, torch.ones(1, 2)), tuple[Tensor, ...])


def gradients() -> None:
    grads: list[list[Tensor | None]] = [[torch.ones(3), None], [torch.ones(3), torch.ones(2)]]
    assert_type(mk.gram(grads), Tensor)
    assert_type(mk.pcgrad_weights(mk.gram(grads), [[1], [0]]), Tensor)
    assert_type(mk.pcgrad(grads, order=[[1], [0]], reduction="mean"), list[Tensor | None])
    assert_type(mk.pcgrad([[torch.ones(3)], [torch.ones(3)]]), list[Tensor | None])
    assert_type(mk.pcgrad(torch.ones(2, 3)), Tensor)


def modules() -> None:
    for trunk in (mk.nn.MMoE(4, 2, (8,)), mk.nn.CGC(4, 2, (8,)), mk.nn.PLE(4, 2, (8,)), mk.nn.SNR(4, 2, (8,), (2,))):
        assert_type(trunk(X), tuple[Tensor, ...])
    snr = mk.nn.SNR(4, num_tasks=2, subnet_units=(8,), num_subnets=(2,))
    assert_type(snr.out_features, int)
    assert_type(snr.l0_penalty(), Tensor)
    assert_type(snr.compact()(X), tuple[Tensor, ...])
    print(snr.routes())


class Model(nn.Module):
    """A trunk and towers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mk.nn.PLE(4, num_tasks=2, expert_units=(8,), num_specific=1, num_shared=1)
        self.towers = nn.ModuleList(nn.Linear(self.trunk.out_features, 1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        assert_type(hidden, tuple[Tensor, ...])
        return [tower(h) for tower, h in zip(self.towers, hidden, strict=True)]


def training() -> None:
    model = Model()
    adam = torch.optim.Adam(model.parameters())
    optimizer = mk.optim.PCGrad(adam, shared=model.trunk.parameters())
    losses = [y.square().mean() for y in model.forward(X)]
    optimizer.zero_grad()
    assert_type(optimizer.pc_backward(losses), Tensor)
    optimizer.step()
    weighted = mk.optim.GramWeighted(adam, lambda gram: gram.diagonal().rsqrt())
    assert_type(weighted.backward([y.square().mean() for y in model.forward(X)]), Tensor)


def serving() -> None:
    model = Model()
    report = mk.convert(model)
    assert_type(report, mk.ConversionReport)
    assert_type(report.replaced[0].detail if report.replaced else "", str)
    assert_type(mk.revert(model), mk.ConversionReport)
    assert_type(mk.prepare(model), Model)


def install() -> None:
    assert_type(mk.show_config(), str)
    assert_type(mk.backends(), dict[str, dict[str, tuple[str, ...]]])
    assert_type(mk.log_decisions(), bool)
    with mk.use_backend("reference") as nothing:
        assert_type(nothing, None)
