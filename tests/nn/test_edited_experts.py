"""What is done to experts after they were made counts, in calls that are kept too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import mtlkernels as mk
from tests.seeding import seed

STYLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gates of two layers": {"gate_units": (8,)},
    "batch norm": {"batch_norm": True},
    "dropout": {"dropout": 0.2},
}


class DropsAlways(nn.Dropout):
    """Monte Carlo dropout as it is often written."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, True)


def _level(**style: Any) -> Any:
    seed(0)
    return mk.nn.MMoE(12, 2, (16, 8), num_experts=3, activation="tanh", **style)


def _calls(model: nn.Module, x: Tensor, times: int = 5) -> None:
    with torch.no_grad():
        for _ in range(times):
            model(x)


def _dropped(outputs: tuple[Tensor, ...]) -> float:
    return float((outputs[0] == 0).double().mean())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("style", STYLES)
def test_dropout_that_is_switched_on_later(style: str, mode: str) -> None:
    """A schedule in training; in evaluation, Monte Carlo dropout. One expert alone shows what is dropped."""
    seed(0)
    model = mk.nn.MMoE(12, 2, (16, 8), num_experts=1, activation="tanh", **STYLES[style])
    x = torch.randn(500, 12)
    model.train(mode == "train")
    _calls(model, x)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
            part.train()
    for record in (False, True):
        with torch.set_grad_enabled(record):
            assert 0.4 < _dropped(model(x)) < 0.6 and 0.4 < _dropped(model.level._by_modules([x])) < 0.6


def test_sub_networks_whose_dropout_is_switched_on_in_evaluation() -> None:
    seed(0)
    model = mk.nn.SNR(12, 2, (16, 8), num_subnets=(2, 2), dropout=0.5).eval()
    x = torch.randn(20, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], model(x)[0], rtol=0, atol=0)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.train()
        assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("made", [nn.Identity, lambda: nn.AlphaDropout(0.5), lambda: DropsAlways(0.5)])
@pytest.mark.parametrize("style", ["plain", "dropout"])
def test_dropout_that_is_exchanged(style: str, made: Callable[[], nn.Module]) -> None:
    model, x, new = _level(**STYLES[style]).eval(), torch.randn(500, 12), made()
    _calls(model, x)
    for expert in model.level.experts:
        expert.dropout = new
    for record in (False, True):
        with torch.set_grad_enabled(record):
            seed(1)
            found = model(x)
            seed(1)
            expected = model.level._by_modules([x])
            for y, right in zip(found, expected, strict=True):
                torch.testing.assert_close(y, right)


def _triple(part: nn.Module) -> None:
    own = part.forward
    part.forward = lambda x: own(x) * 3  # type: ignore[method-assign]


def _offload(layer: Any) -> None:
    """Weights that the layer's own forward brings, as Accelerate does it."""
    kept = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.to("meta")
    layer.forward = lambda x: nn.functional.linear(x, **kept)


def _append_norms(expert: Any) -> None:
    expert.norms.extend([nn.LayerNorm(16), nn.LayerNorm(8)])


EDITS: dict[str, tuple[str, Callable[[Any], None], dict[str, Any]]] = {
    "a layer's forward": ("experts.1.linears.0", _triple, {}),
    "an expert's forward": ("experts.1", _triple, {}),
    "a dropout's forward": ("experts.1.dropout", _triple, {}),
    "a norm's forward": ("experts.1.norms.1", _triple, {"batch_norm": True}),
    "a gate's forward": ("gates", _triple, {}),
    "weights from elsewhere": ("experts.1.linears.1", _offload, {}),
    "norms of one": ("experts.1", _append_norms, {}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_modules_do_otherwise(edit: str) -> None:
    place, change, style = EDITS[edit]
    model, x = _level(**style).eval(), torch.randn(300, 12)
    _calls(model, x)
    before = [y.clone() for y in model(x)]
    change(model.level.get_submodule(place))
    for record in (False, True):
        with torch.set_grad_enabled(record):
            for y, right, old in zip(model(x), model.level._by_modules([x]), before, strict=True):
                torch.testing.assert_close(y, right)
                assert edit == "weights from elsewhere" or (y - old).abs().max() > 1e-2


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("first", [True, False])
def test_pruned_norms(first: bool, which: str) -> None:
    """What pruning makes of a parameter is made anew by a hook of the norm, in training once a step."""
    model, x = _level(batch_norm=True), torch.randn(30, 12)
    for expert in list(model.level.experts)[: 1 if first else None]:
        nn.init.uniform_(expert.norms[0].bias)
        prune.l1_unstructured(expert.norms[0], which, amount=0.5)
    original = getattr(model.level.experts[0].norms[0], f"{which}_orig")
    for _ in range(2):
        sum(y.square().mean() for y in model(x)).backward()
    assert original.grad is not None
    model.eval()
    _calls(model, x)
    with torch.no_grad():
        original.mul_(10)
        for y, right in zip(model(x), model.level._by_modules([x]), strict=True):
            torch.testing.assert_close(y, right)


def _wider(expert: Any) -> None:
    expert.linears[0], expert.linears[1] = nn.Linear(12, 20), nn.Linear(20, 8)


def _deeper(expert: Any) -> None:
    expert.linears.insert(1, nn.Linear(16, 16))


@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize("change", [_wider, _deeper])
def test_an_expert_of_other_layers(change: Callable[[Any], None], forced: str | None) -> None:
    """Then experts are called as modules."""
    model, x = _level(), torch.randn(30, 12)
    _calls(model, x)
    change(model.level.experts[1])
    for record in (False, True):
        with torch.set_grad_enabled(record), mk.use_backend(forced) if forced else torch.enable_grad():
            for y, right in zip(model(x), model.level._by_modules([x]), strict=True):
                torch.testing.assert_close(y, right)


def test_norms_that_all_experts_get() -> None:
    model, x = _level().eval(), torch.randn(30, 12)
    _calls(model, x)
    for expert in model.level.experts:
        _append_norms(expert)
    for y, right in zip(model(x), model.level._by_modules([x]), strict=True):
        torch.testing.assert_close(y, right)


def test_statistics_that_are_parameters() -> None:
    """They are no buffers any more, and PyTorch takes them all the same."""
    model, x = _level(batch_norm=True).eval(), torch.randn(30, 12)
    _calls(model, x)
    for expert in model.level.experts:
        expert.norms[0].running_mean = nn.Parameter(torch.rand(16), requires_grad=False)
    for record in (False, True):
        with torch.set_grad_enabled(record):
            for y, right in zip(model(x), model.level._by_modules([x]), strict=True):
                torch.testing.assert_close(y, right)
    norm = nn.BatchNorm1d(4).eval()
    norm.running_mean = nn.Parameter(torch.rand(4), requires_grad=False)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"norms\[0\]\[0\].running_mean must be a buffer, got Parameter"):
        mk.expert_mixture(x, [[torch.randn(4, 12)]], None, torch.zeros(30, 1), mk.Routing.mmoe(1, 1), norms=[[norm]])
