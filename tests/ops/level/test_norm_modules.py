"""expert_mixture with norm modules against calling the modules: outputs, gradients, running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk

ROUTING = mk.Routing.cgc(2, 2, 1, shared_gate=True)
WIDTHS = (7, 6, 5)
Make = Callable[..., nn.Module]

MODULES: dict[str, Make] = {
    "batch norm": nn.BatchNorm1d,
    "no scales": lambda n, **kw: nn.BatchNorm1d(n, affine=False, **kw),
    "no running statistics": lambda n, **kw: nn.BatchNorm1d(n, track_running_stats=False, **kw),
    "momentum": lambda n, **kw: nn.BatchNorm1d(n, momentum=0.3, eps=1e-3, **kw),
    "no momentum": lambda n, **kw: nn.BatchNorm1d(n, momentum=0.0, **kw),
    "cumulative": lambda n, **kw: nn.BatchNorm1d(n, momentum=None, **kw),
    "layer norm": nn.LayerNorm,
    "no layer norm scales": lambda n, **kw: nn.LayerNorm(n, elementwise_affine=False, **kw),
    "no layer norm shifts": lambda n, **kw: nn.LayerNorm(n, bias=False, **kw),
}


class Experts(nn.Module):
    """The experts of a level, run fused or one module after another."""

    def __init__(self, make: Make, normalized: tuple[bool, bool] = (True, True), dtype: torch.dtype = torch.float64):
        super().__init__()
        pairs = list(zip(WIDTHS, WIDTHS[1:], strict=False))
        experts = range(ROUTING.num_experts)
        self.linears = nn.ModuleList(nn.ModuleList(nn.Linear(a, b, dtype=dtype) for _ in experts) for a, b in pairs)
        self.norms = nn.ModuleList(
            nn.ModuleList(make(b, dtype=dtype) for _ in experts if has)
            for (_, b), has in zip(pairs, normalized, strict=True)
        )
        for norm in self.norms.modules():
            if getattr(norm, "weight", None) is not None:
                nn.init.normal_(norm.weight, 1.0, 0.3)
                if norm.bias is not None:
                    nn.init.normal_(norm.bias)

    def fused(self, x: list[Tensor], logits: list[Tensor]) -> Any:
        layers: Any = self.linears
        weights = [[linear.weight for linear in layer] for layer in layers]
        biases = [[linear.bias for linear in layer] for layer in layers]
        norms: Any = [layer if len(layer) else None for layer in self.norms]  # type: ignore[arg-type]
        return mk.expert_mixture(x, weights, biases, logits, ROUTING, activation="silu", norms=norms)

    def forward(self, x: list[Tensor], logits: list[Tensor]) -> Any:
        outputs = []
        for e, stream in enumerate(ROUTING.expert_inputs):
            hidden = x[stream]
            for layer, norms in zip(self.linears, self.norms, strict=True):
                hidden = layer[e](hidden)  # type: ignore[index]
                if len(norms):  # type: ignore[arg-type]
                    hidden = norms[e](hidden)  # type: ignore[index]
                hidden = F.silu(hidden)
            outputs.append(hidden)
        with mk.use_backend("reference"):
            return mk.gated_mixture(torch.stack(outputs, 1), logits, ROUTING)


def step(run: Any, model: Experts, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs and gradients of every argument and parameter."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    x = [leaf(9, WIDTHS[0]) for _ in range(ROUTING.num_inputs)]
    logits = [leaf(9, len(gate)) for gate in ROUTING.gate_experts]
    y = run(x, logits)
    found = torch.autograd.grad(sum(v.square().sum() for v in y), [*x, *logits, *model.parameters()])
    return [*y, *found]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("normalized", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_modules(make: Make, normalized: tuple[bool, bool], training: bool, backend: str) -> None:
    """Over three steps, and then in the other mode."""
    model = Experts(make, normalized)
    other = copy.deepcopy(model)
    for mode, steps in ((training, 3), (not training, 1)):
        model.train(mode)
        other.train(mode)
        for seed in range(steps):
            with mk.use_backend(backend):
                got = step(model.fused, model, seed)
            assert_close(got, step(other, other, seed), 1e-10)
            assert_close(list(model.buffers()), list(other.buffers()), 1e-12)


def test_statistics_in_float32(backend: str) -> None:
    model = Experts(nn.BatchNorm1d, dtype=torch.float32)
    other = copy.deepcopy(model)
    for seed in range(3):
        with mk.use_backend(backend):
            got = step(model.fused, model, seed, torch.float32)
        assert_close(got, step(other, other, seed, torch.float32), 1e-4)
    assert_close(list(model.buffers()), list(other.buffers()), 1e-6)


def test_frozen_norms_beside_others(backend: str) -> None:
    """A layer whose norms are in evaluation is folded, the other one uses the batch's statistics."""
    model = Experts(nn.BatchNorm1d)
    step(model, model, 0)
    model.norms[0].eval()
    other = copy.deepcopy(model)
    with mk.use_backend(backend):
        got = step(model.fused, model, 1)
    assert_close(got, step(other, other, 1), 1e-10)
    assert_close(list(model.buffers()), list(other.buffers()), 1e-12)


def test_statistics_that_are_not_tracked_any_more(backend: str) -> None:
    """In training with ``track_running_stats`` off, PyTorch uses the batch's statistics and updates none."""
    model = Experts(nn.BatchNorm1d)
    for norm in model.norms.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.track_running_stats = False
    other, before = copy.deepcopy(model), [b.clone() for b in model.buffers()]
    with mk.use_backend(backend):
        got = step(model.fused, model, 0)
    assert_close(got, step(other, other, 0), 1e-10)
    assert_close(list(model.buffers()), before, 0.0)


def test_no_gradient_wanted(backend: str) -> None:
    model = Experts(nn.BatchNorm1d)
    other = copy.deepcopy(model)
    x, logits = [torch.randn(9, 7).double()] * 3, [torch.randn(9, len(gate)).double() for gate in ROUTING.gate_experts]
    for context in (torch.no_grad, torch.inference_mode):
        with mk.use_backend(backend), context():
            got = model.fused(x, logits)
        with torch.no_grad():
            assert_close(list(got), list(other(x, logits)), 1e-10)
        assert_close(list(model.buffers()), list(other.buffers()), 1e-12)


def test_an_expert_without_a_gate_keeps_its_statistics(backend: str) -> None:
    norms = [nn.BatchNorm1d(4) for _ in range(3)]
    routing = mk.Routing((0, 0, 0), ((2, 0),))
    with mk.use_backend(backend):
        mk.expert_mixture(torch.randn(8, 5), [torch.randn(3, 4, 5)], None, torch.randn(8, 2), routing, norms=[norms])
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 0, 1]  # type: ignore[arg-type]
    assert not norms[1].running_mean.any() and norms[2].running_mean.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(rows: int) -> None:
    """PyTorch's own error, and nothing is counted before it."""
    norms = [nn.BatchNorm1d(4)]
    routing = mk.Routing.mmoe(1, 1)
    with pytest.raises(ValueError, match=rf"Expected more than 1 value per channel.*size torch.Size\(\[{rows}, 4\]\)"):
        mk.expert_mixture(
            torch.randn(rows, 5), [torch.randn(1, 4, 5)], None, torch.randn(rows, 1), routing, norms=[norms]
        )
    assert int(norms[0].num_batches_tracked) == 0  # type: ignore[arg-type]
