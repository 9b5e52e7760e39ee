"""TorchJD's autogram, which finds parameters by hooks on modules that are called: its Gram matrix is the right one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import UPGradWeighting
from torchjd.autogram import Engine

import mtlkernels as mk
from mtlkernels._convert import description
from mtlkernels.nn import level
from tests.convert.models import by_name, features, mmoe, ple, rechub_ple

TASKS = 3
X = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "ple": lambda: mk.nn.PLE(5, TASKS, (6, 4), num_specific=1, num_shared=2),
    "gates": lambda: mk.nn.PLE(5, TASKS, (6, 4), num_specific=1, num_shared=2, gate_units=(3,)),
    "prelu": lambda: mk.nn.PLE(5, TASKS, (6, 4), 1, 2, gate_units=(3,), activation="prelu"),
    "dice": lambda: mk.nn.MMoE(5, TASKS, (6, 4), num_experts=3, activation="dice"),
    "batch norm": lambda: mk.nn.PLE(5, TASKS, (6, 4), num_specific=1, num_shared=2, batch_norm=True),
    "batch norm alone": lambda: only_norms(mk.nn.CGC(5, TASKS, (6, 4), 1, 2, batch_norm=True)),
    "cgc": lambda: mk.nn.CGC(5, TASKS, (6, 4), num_specific=1, num_shared=2),
    "snr": lambda: mk.nn.SNR(5, TASKS, (6, 4), (3, 2)).eval(),
}


def only_norms(trunk: nn.Module) -> nn.Module:
    """Fine-tuning: of the experts, only norms are trained, so that they alone get hooks."""
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_("norms" in name or "gates" in name)
    return trunk


def gram_of(losses: Tensor, *modules: nn.Module) -> Tensor:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses.flatten()]
    return mk.gram([list(row) for row in grads])


def assert_agrees(forward: Callable[[], Tensor], *modules: nn.Module, batch_dim: int | None = None) -> None:
    """The matrix of TorchJD's engine, and that of gradients that are made one by one where it is gone."""
    engine = Engine(*modules, batch_dim=batch_dim)
    found = engine.compute_gramian(forward())
    del engine
    gc.collect()
    torch.testing.assert_close(found, gram_of(forward(), *modules))


@pytest.mark.parametrize("name", TRUNKS)
def test_trunks(name: str) -> None:
    """With towers, whose hooks are nearer to the losses than those of the trunk."""
    torch.manual_seed(0)
    trunk = TRUNKS[name]().double()
    towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS)).double()

    def losses() -> Tensor:
        return torch.stack([tower(h).square().mean() for tower, h in zip(towers, trunk(X), strict=True)])

    assert_agrees(losses, trunk)
    assert_agrees(losses, trunk, towers)


@pytest.mark.parametrize("name", [name for name in TRUNKS if "norm" not in name and name != "snr"])
def test_trunks_by_rows(name: str) -> None:
    """A loss a row and task, which TorchJD differentiates by calling modules again, a row at a time."""
    trunk = TRUNKS[name]().double()
    assert_agrees(lambda: torch.stack([h.square().sum(1) for h in trunk(X)], 1), trunk, batch_dim=0)


@pytest.mark.parametrize("name", ["ple", "prelu", "batch norm"])
def test_fused_again_without_an_engine(name: str) -> None:
    trunk = TRUNKS[name]().double()
    with mock.patch.object(level, "expert_mixture", wraps=level.expert_mixture) as fused:
        trunk(X)
        before = fused.call_count
        assert before == 2
        engine = Engine(trunk, batch_dim=None)
        trunk(X)
        assert fused.call_count == before
        del engine
        gc.collect()
        trunk(X)
        assert fused.call_count == 2 * before


def test_weights_of_both_are_the_same() -> None:
    """The step that TorchJD documents for its engine, and that of mk.optim.GramWeighted."""
    trunk = TRUNKS["ple"]().double()
    other = copy.deepcopy(trunk)

    def losses(model: nn.Module) -> Tensor:
        return torch.stack([h.square().mean() - h.sum() for h in model(X)])

    engine, weighting = Engine(other, batch_dim=None), UPGradWeighting()
    values = losses(other)
    values.backward(weighting(engine.compute_gramian(values)))
    mk.optim.GramWeighted(torch.optim.SGD(trunk.parameters()), weighting).backward(losses(trunk))
    for a, b in zip(trunk.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


LIBRARIES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Any]]] = {
    "torch-rechub": (rechub_ple, by_name),
    "deepctr-torch": (ple, lambda rows: rows),
    "deepctr-torch mmoe": (mmoe, lambda rows: rows),
}


@pytest.mark.parametrize("engine_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_converted_models(library: str, mode: str, engine_first: bool) -> None:
    """The conversion sees the hooks, or the call does; the right matrix is that of the library's own modules."""
    make, given = LIBRARIES[library]
    model = getattr(make().double(), mode)()
    original, rows = copy.deepcopy(model), given(features(9))

    def losses(which: nn.Module) -> Tensor:
        squares: Tensor = which(rows).square().mean(0)
        return squares

    if not engine_first:
        assert mk.convert(model, force=True).replaced
    engine = Engine(model, batch_dim=None)
    if engine_first:
        report = mk.convert(model, force=True)
        assert not report.replaced and "has a hook" in str(report)
    found = engine.compute_gramian(losses(model))
    torch.testing.assert_close(found, gram_of(losses(original), original))


class BareGates(nn.Module):
    """Gates that are parameters of the level itself, so that the engine's hook is on the level."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 4), nn.Tanh()) for _ in range(4))
        self.gates = nn.Parameter(torch.randn(TASKS, 5, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [((x @ gate).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


@pytest.mark.parametrize("rows", [9, 300])  # below 128 gates that lie across are not fused
def test_a_level_with_parameters_of_its_own(rows: int) -> None:
    mk.convert.register(
        BareGates,
        experts=lambda module: module.experts,
        gates=lambda module: module.gates,
        routing=lambda module: mk.Routing.mmoe(len(module.experts), len(module.gates)),
    )
    trunk = BareGates().double()
    towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS)).double()
    x = torch.randn(rows, 5, dtype=torch.float64)
    assert mk.convert(trunk, force=True).replaced

    def losses() -> Tensor:
        return torch.stack([tower(h).square().mean() for tower, h in zip(towers, trunk(x), strict=True)])

    with mock.patch.object(description, "evaluate", wraps=description.evaluate) as fused:
        losses()
        assert fused.called
    assert_agrees(losses, trunk)
    assert_agrees(losses, trunk, towers)
