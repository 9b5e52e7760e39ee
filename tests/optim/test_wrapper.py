"""mk.optim.PCGrad amid optimizers, schedulers, checkpoints, torch.compile and gradient scaling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.optim.model import Model, assert_close, expected, grads_of


def test_passes_through() -> None:
    model = Model()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = mk.optim.PCGrad(adam, shared=model.trunk.parameters())
    assert optimizer.optimizer is adam and isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is adam.param_groups and optimizer.defaults is adam.defaults
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args[0]))
    optimizer.register_step_pre_hook(lambda *args: calls.append(args[0]))
    optimizer.register_state_dict_pre_hook(calls.append)
    optimizer.register_state_dict_post_hook(lambda who, state: calls.append(who))
    optimizer.register_load_state_dict_pre_hook(lambda who, state: calls.append(who))
    optimizer.register_load_state_dict_post_hook(calls.append)
    optimizer.pc_backward(model())
    optimizer.step()
    assert optimizer.state is adam.state and len(optimizer.state) == len(list(model.parameters())) - 2
    saved = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.Adam(model.parameters(), lr=0.5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.1 and other.state_dict()["state"].keys() == saved["state"].keys()
    optimizer.load_state_dict(other.state_dict())
    assert calls == [adam] * 6
    optimizer.zero_grad(set_to_none=False)
    assert model.trunk[0].weight.grad is not None and not model.trunk[0].weight.grad.any()
    optimizer.zero_grad()
    assert model.trunk[0].weight.grad is None
    assert repr(optimizer).startswith("PCGrad(Adam (")


class ScheduleFree(torch.optim.SGD):
    """Has methods and attributes that PyTorch's optimizers have not."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.training = False
        self._private = 1

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def first_step(self, zero_grad: bool = False) -> str:
        return f"zero_grad={zero_grad}"

    @property
    def broken(self) -> float:
        return self.missing  # type: ignore[attr-defined, no-any-return]


def wrappers(optimizer: torch.optim.Optimizer) -> list[mk.optim.GramWeighted]:
    return [mk.optim.PCGrad(optimizer), mk.optim.GramWeighted(optimizer, lambda gram: gram[0])]


def test_methods_that_the_wrapped_optimizer_alone_has() -> None:
    model = Model()
    inner = ScheduleFree(model.parameters(), 0.1)
    for optimizer in wrappers(inner):
        optimizer.train()
        assert inner.training and optimizer.training
        optimizer.eval()
        assert not inner.training and not optimizer.training
        assert optimizer.first_step(zero_grad=True) == "zero_grad=True"
        assert not hasattr(optimizer, "_private") and not hasattr(optimizer, "_step_supports_amp_scaling")


class OfItsOwnWay(torch.optim.SGD):
    """Has other arguments than PyTorch's optimizers have."""

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad(set_to_none=False)

    def step(self, closure: Callable[[], Any] | None = None, rows: int = 1) -> Any:
        return rows, super().step(closure)


def test_arguments_that_the_wrapped_optimizer_alone_has() -> None:
    model = Model()
    inner = OfItsOwnWay(model.parameters(), 0.1)
    for optimizer in wrappers(inner):
        optimizer.backward(model())
        assert optimizer.step(rows=4) == (4, None) and optimizer.step() == (1, None)
        assert optimizer.step(lambda: 5.0, rows=3) == (3, 5.0)
        optimizer.zero_grad()
        assert model.trunk[0].weight.grad is not None and not model.trunk[0].weight.grad.any()


@pytest.mark.parametrize("name", ["state", "param_groups", "defaults"])
def test_what_is_set_is_the_wrapped_optimizers(name: str) -> None:
    inner = torch.optim.Adam(Model().parameters())
    for optimizer in wrappers(inner):
        value = copy.copy(getattr(inner, name))
        setattr(optimizer, name, value)
        assert getattr(inner, name) is getattr(optimizer, name) is value


def test_what_neither_has() -> None:
    for optimizer in wrappers(torch.optim.SGD(Model().parameters())):
        name = type(optimizer).__name__
        assert not hasattr(optimizer, "train") and getattr(optimizer, "train", None) is None
        with pytest.raises(AttributeError, match=f"^{name} has no attribute 'train', and neither has the SGD"):
            optimizer.train()
        with pytest.raises(AttributeError, match=f"^{name} has no attribute '_hidden'$"):
            _ = optimizer._hidden
    with pytest.raises(AttributeError, match="broken") as caught:
        _ = mk.optim.PCGrad(ScheduleFree(Model().parameters())).broken
    assert "missing" in str(caught.value.__cause__), "what failed in the wrapped optimizer is told"


def test_before_there_is_an_optimizer() -> None:
    """An object that is being loaded or copied has no attributes yet."""
    for kind in (mk.optim.PCGrad, mk.optim.GramWeighted):
        empty = kind.__new__(kind)
        for name in ("optimizer", "train", "_memory"):
            with pytest.raises(AttributeError, match=f"^{kind.__name__} has no attribute '{name}'$"):
                getattr(empty, name)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_hand_on(clone: Callable[[Any], Any]) -> None:
    inner = ScheduleFree(Model().parameters())
    other = clone(mk.optim.PCGrad(inner))
    other.train()
    assert other.optimizer.training and inner.training == (other.optimizer is inner)


def test_closure() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.LBFGS(model.parameters(), max_iter=3), shared=model.trunk.parameters())
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = model()
        optimizer.pc_backward(losses)
        calls.append(1)
        return sum(losses).detach()  # type: ignore[union-attr]

    first = optimizer.step(closure)
    assert isinstance(first, Tensor) and len(calls) > 1
    with torch.no_grad():
        assert sum(model()) < first


@pytest.mark.parametrize("where", ["wrapper", "wrapped"])
def test_schedulers(where: str) -> None:
    """On the wrapper or on what it wraps, without a warning about the order of calls."""
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    optimizer = mk.optim.PCGrad(sgd)
    on: torch.optim.Optimizer = optimizer if where == "wrapper" else sgd
    schedulers = [torch.optim.lr_scheduler.StepLR(on, 1), torch.optim.lr_scheduler.OneCycleLR(on, 0.5, 10)]
    before = sgd.param_groups[0]["lr"]
    optimizer.pc_backward(model())
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    assert sgd.param_groups[0]["lr"] != before
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own, kept = again.param_groups[0]["params"][0], model.trunk[0].weight.clone()
        again.zero_grad()
        again.pc_backward([own.sum(), (2 * own).sum()])
        again.step()
        assert not torch.equal(own, kept) and torch.equal(model.trunk[0].weight, kept), "a copy steps on its own"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(clone: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the copy draws as the original does
    model = Model()
    optimizer = mk.optim.PCGrad(
        torch.optim.Adam(model.parameters()),
        shared=model.trunk.parameters(),
        generator=torch.Generator().manual_seed(5),
        max_norm=0.1,
    )
    optimizer.pc_backward(model())
    optimizer.step()
    other_model, other = clone((model, optimizer))
    assert other.generator is not optimizer.generator
    assert torch.equal(other.generator.get_state(), optimizer.generator.get_state())  # type: ignore[union-attr]
    for m, o in ((model, optimizer), (other_model, other)):
        o.zero_grad()
        o.pc_backward(m())
        o.step()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("where", ["trunk and heads", "whole"])
def test_compiled_models(where: str, fresh_compiler: None) -> None:
    """Several backward passes go through one compiled graph."""
    model = Model()
    wanted = expected(model, list(model.trunk.parameters()), list(model.heads.parameters()))
    if where == "whole":
        compiled: Callable[[], list[Tensor]] = torch.compile(model, backend="aot_eager")
    else:
        model.trunk.compile(backend="aot_eager")
        compiled = model
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward(compiled())
        assert_close(grads_of([*model.trunk.parameters(), *model.heads.parameters()]), wanted)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.3, "eps": 0.01, "normalize": True}], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_scaler(options: dict[str, Any], batched: bool) -> None:
    """``.grad`` is scaled while clipping, as it was asked for, is not."""
    model, plain = Model(torch.float32), Model(torch.float32)
    plain.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [
        mk.optim.PCGrad(torch.optim.SGD(m.parameters(), 0.1), shared=m.trunk.parameters(), batched=batched, **options)
        for m in (model, plain)
    ]
    gram = optimizers[0].pc_backward(model(), scaler=scaler)
    torch.testing.assert_close(optimizers[1].pc_backward(plain()), gram)
    for a, b in zip(grads_of(model.parameters()), grads_of(plain.parameters()), strict=True):
        if a is not None:
            torch.testing.assert_close(a / 1024, b)
    scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("how", ["wrapper", "wrapped", "fused"])
def test_scaled_losses(how: str) -> None:
    """The pattern of torch.amp's documentation, with unscale_ before clipping."""
    model, plain = Model(torch.float32), Model(torch.float32)
    plain.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    inner = [torch.optim.Adam(m.parameters(), 0.1, fused=how == "fused") for m in (model, plain)]
    optimizer, reference = (
        mk.optim.PCGrad(o, shared=m.trunk.parameters()) for o, m in zip(inner, (model, plain), strict=True)
    )
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.pc_backward([scaler.scale(loss) for loss in model()])
        at = inner[0] if how == "wrapped" else optimizer
        if how != "fused":
            scaler.unscale_(at)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(at)
        scaler.update()
        reference.zero_grad()
        reference.pc_backward(plain())
        if how != "fused":
            nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        reference.step()
    # After three steps of Adam, which divides by what is rounded; a step by the wrong scale is off by far more.
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"normalize": True}], ids=str)
def test_overflow_skips_the_step(options: dict[str, Any], sparse: bool) -> None:
    model = Model(torch.float32, sparse=sparse)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters(), 0.1), shared=model.shared(), **options)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.y.mul_(100)
    optimizer.pc_backward(model(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**126


def test_scaler_under_no_grad() -> None:
    """The losses are scaled there, too."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight]), reduction="sum")
    loss = (3 * weight).sum()
    with torch.no_grad():
        optimizer.pc_backward([loss], scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    assert weight.grad is not None and weight.grad.tolist() == [12.0, 12.0]
