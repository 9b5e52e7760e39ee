"""What a pass in training writes to running statistics is no change to autograd, and is seen by the next call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import _fusing
from tests.ways_out.kinds import CONVERTED, TRUNKS

MOMENTA = pytest.mark.parametrize("momentum", [0.3, None])
# The first has batch norms outside of experts too, whose modules always run.
NAMES = ["deepctr MMOE with batch norm", "CGC with batch norm", "PLE with batch norm", "TorchEasyRec MMoE"]
MODELS = pytest.mark.parametrize("name", NAMES)


def models(name: str) -> tuple[Any, Any]:
    """One that is fused, and one of the same weights whose modules run."""
    kind = {**TRUNKS, **CONVERTED}[name]
    model = kind.model().double()
    return model, kind.original().double() if kind.convert else by_modules(model)


def by_modules(model: Any) -> Any:
    """A copy with a hook on each layer, which has its modules called."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    return copied


def inputs(name: str, rows: int) -> Tensor:
    x: Tensor = {**TRUNKS, **CONVERTED}[name].inputs(rows, 1)[0]
    return x.double()


def consistency(evaluated: Any, trained: Any) -> Tensor:
    """A loss of what an evaluation pass gave and of what a training pass did."""
    pairs = zip(torch.utils._pytree.tree_leaves(evaluated), torch.utils._pytree.tree_leaves(trained), strict=True)
    return sum((a - b).square().sum() for a, b in pairs)  # type: ignore[return-value]


def gradients(model: Any, x: Tensor) -> list[Tensor | None]:
    """Of one backward pass through both."""
    evaluated = model.eval()(x)
    consistency(evaluated, model.train()(x)).backward()
    return [p.grad for p in model.parameters()]


def assert_close(found: Any, expected: Any) -> None:
    """In float64, of which nothing more exact tells how far modules are off; None is None."""
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rows", [8, 40])
@MODELS
def test_evaluation_then_training_then_one_backward_pass(name: str, rows: int) -> None:
    """On rows so few that the modules evaluate: their gradients, and their statistics."""
    model, plain = models(name)
    x = inputs(name, rows)
    assert_close(gradients(model, x), gradients(plain, x))
    assert_close(model.buffers(), plain.buffers())


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_fused_evaluation_has_the_gradients_of_what_it_saw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each pass had a model to itself; PyTorch's batch norm takes the statistics of the later pass."""
    monkeypatch.setattr(_fusing, "SMALL", 0)  # so that narrow layers are fused on so few rows
    model, plain = models(name)
    x = inputs(name, 150)
    evaluated, trained = plain.eval(), copy.deepcopy(plain).train()
    consistency(evaluated(x), trained(x)).backward()
    pairs = zip(evaluated.parameters(), trained.parameters(), strict=True)
    expected = [None if p.grad is None or q.grad is None else p.grad + q.grad for p, q in pairs]
    assert_close(gradients(model, x), expected)
    assert_close(model.buffers(), trained.buffers())


def level(momentum: float | None) -> tuple[Any, nn.ModuleList]:
    """A level as a function of its inputs, and its norms."""
    weight, logits = torch.randn(3, 5, 7), torch.randn(6, 6)
    norms = nn.ModuleList(nn.BatchNorm1d(5, momentum=momentum) for _ in range(3))
    return lambda x: mk.expert_mixture(x, [weight], None, logits, mk.Routing.mmoe(3, 2), norms=[norms]), norms


@MOMENTA
def test_versions(momentum: float | None) -> None:
    """Those of PyTorch's own batch norm, which counts batches, and nothing else."""
    run, norms = level(momentum)
    plain: Any = copy.deepcopy(norms[0])
    before = [statistic.clone() for statistic in norms.buffers()]
    x = torch.randn(6, 7)
    run(x)
    plain(torch.randn(6, 5))
    for norm in norms:
        assert [b._version for b in norm.buffers()] == [b._version for b in plain.buffers()]
    assert not any(torch.equal(a, b) for a, b in zip(norms.buffers(), before, strict=True))


@MOMENTA
def test_writes_of_others_are_counted_still(momentum: float | None) -> None:
    run, norms = level(momentum)
    x, mean = torch.randn(5, requires_grad=True), norms[0].running_mean
    assert isinstance(mean, Tensor)
    y = (x * mean).sum()
    run(torch.randn(6, 7))
    mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@MOMENTA
def test_statistics_that_have_no_version(momentum: float | None) -> None:
    """Those that were made in inference mode."""
    with torch.inference_mode():
        run, norms = level(momentum)
        before = [statistic.clone() for statistic in norms.buffers()]
        run(torch.randn(6, 7))
    assert not any(torch.equal(a, b) for a, b in zip(norms.buffers(), before, strict=True))


@pytest.mark.parametrize("rows", [8, 150])
@MODELS
def test_what_serves_sees_the_statistics(name: str, rows: int) -> None:
    """Whoever wrote them, this package or PyTorch's batch norm: nothing hangs on their versions."""
    model, _ = models(name)
    x = inputs(name, rows)
    for train in (model, by_modules_with_statistics_of(model)):
        before = [serve(model, x) for _ in range(3)]  # calls that serve are kept after the first
        versions = [b._version for b in model.buffers() if b.is_floating_point()]
        train.train()(x)
        assert [b._version for b in model.buffers() if b.is_floating_point()] == versions
        after = serve(model, x)
        assert float(consistency(after, before[-1])) > 0
        assert float(consistency(after, serve(copy.deepcopy(model), x))) <= 1e-18


@torch.no_grad()
def serve(model: Any, x: Tensor) -> Any:
    return model.eval()(x)


def by_modules_with_statistics_of(model: Any) -> Any:
    """:func:`by_modules`, whose passes in training bring the model's own statistics up to date."""
    plain = by_modules(model)
    for name, norm in plain.named_modules():
        if isinstance(norm, nn.BatchNorm1d):
            own = model.get_submodule(name)
            norm.running_mean, norm.running_var = own.running_mean, own.running_var
    return plain


def test_a_prepared_copy_sees_them_too() -> None:
    model = models("PLE with batch norm")[0].float()
    prepared: Any = mk.prepare(model)
    x = inputs("PLE with batch norm", 70).float()
    with torch.no_grad():
        before = prepared(x)
        for norm in prepared.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.train()(torch.randn(9, norm.num_features) + 3)
                norm.eval()
        assert float(consistency(prepared(x), before)) > 0
        torch.testing.assert_close(list(prepared(x)), list(by_modules(prepared)(x)))
