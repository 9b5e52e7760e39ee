"""mk.prepare: a serving copy that keeps prepared weights, refuses training, and notices what is counted."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires
from tests.convert.doubles import ExtractionNet
from tests.ops.agreement import assert_as_exact
from tests.ops.kept_memory import release

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 16, 64, 100, 200, 300)


def trunk(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return mk.nn.PLE(40, 2, (80, 72), num_specific=1, num_shared=1, num_levels=2, **options).to(dtype)


def serve(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(x))


def assert_serves_as(model: nn.Module, prepared: nn.Module, x: Tensor) -> None:
    found = serve(prepared, x)
    assert_as_exact(found, serve(copy.deepcopy(model).double(), x.double()), serve(model, x))


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("batch_norm", (False, True))
def test_serves_the_models_numbers(batch_norm: bool, kind: torch.dtype) -> None:
    model = trunk(kind, batch_norm=batch_norm).eval()
    prepared = mk.prepare(model)
    assert type(prepared) is type(model)
    for isa in _extension.instruction_sets() or ("",):
        for rows in ROWS:
            x = torch.randn(rows, 40).to(kind)
            exact = serve(copy.deepcopy(model).double(), x.double())
            if isa:
                with _extension.instruction_set(isa):
                    found = [serve(prepared, x) for _ in range(3)][-1]
                    plain = serve(model, x)
            else:
                found, plain = serve(prepared, x), serve(model, x)
            assert_as_exact(found, exact, plain)


def test_weights_that_inference_mode_made() -> None:
    """They count no changes, so that nothing of theirs is kept."""
    with torch.inference_mode():
        model = trunk(torch.bfloat16).eval()
        x = torch.randn(200, 40).to(torch.bfloat16)
    prepared = mk.prepare(model)
    for isa in _extension.instruction_sets():
        with _extension.instruction_set(isa), torch.inference_mode():
            assert all(map(torch.equal, prepared(x), model(x)))


@requires.kept_weights
def test_nothing_is_kept_of_a_weight_that_inference_mode_made() -> None:
    """Of which nothing counts what is written to it."""
    with torch.inference_mode():
        x, weight, logits = torch.randn(200, 40), torch.randn(3, 80, 40), torch.randn(200, 6)
        weights = list(weight)
        _extension.function("keep_prepared")(weights)

        def outputs() -> list[Tensor]:
            return list(mk.expert_mixture(x, [weights], None, logits, mk.Routing.mmoe(3, 2), activation="none"))

        before = outputs()
        weight.mul_(2)
        for y, old in zip(outputs(), before, strict=True):
            torch.testing.assert_close(y, 2 * old)


def test_what_trains_the_model_does_not_reach_it() -> None:
    model = trunk()
    prepared = mk.prepare(model)
    x = torch.randn(200, 40)
    before = serve(prepared, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert all(torch.equal(a, b) for a, b in zip(serve(prepared, x), before, strict=True))
    assert not any(p.requires_grad for p in prepared.parameters())
    assert all(p.requires_grad for p in model.parameters()) and model.training


def test_refuses_training() -> None:
    prepared: Any = mk.prepare(trunk())
    x = torch.randn(5, 40)
    prepared.train()
    with pytest.raises(RuntimeError, match="serves only, got a call in training mode"):
        prepared(x)
    prepared.eval()
    serve(prepared, x)
    prepared.levels[1].train()
    with pytest.raises(RuntimeError, match="serves only"):
        prepared(x)


class Around(nn.Module):
    """A model with another way in than its call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def predict(self, *args: Any) -> Any:
        return self.inner(*args)


def converted() -> nn.Module:
    """A level of a library."""
    level = ExtractionNet(40, (8,), tasks=2)
    assert "replaced" in str(mk.convert(level))
    return level


INNER = {
    "trunk": trunk,
    "SNR": lambda: mk.nn.SNR(40, 2, (8,), (3,)),
    "compact SNR": lambda: mk.nn.SNR(40, 2, (8,), (3,)).compact(),
    "converted": converted,
}


@pytest.mark.parametrize("kind", INNER)
def test_refuses_training_by_whatever_way(kind: str) -> None:
    """In a model whose own forward is not called."""
    prepared: Any = mk.prepare(Around(INNER[kind]()))
    x = ([torch.randn(64, 40)] * 2, torch.randn(64, 40)) if kind == "converted" else (torch.randn(64, 40),)
    with torch.no_grad():
        prepared.predict(*x)
        prepared.train()
        with pytest.raises(RuntimeError, match="serves only, got a call in training mode"):
            prepared.predict(*x)


class Own(nn.Module):
    """A model that calls the operator itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(8, 40) for _ in range(3))
        self.gates = nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Any:
        return mk.expert_mixture(x, [list(self.weights)], None, self.gates(x), mk.Routing.mmoe(3, 2))


def test_a_model_that_calls_operators_itself_refuses_training() -> None:
    prepared = mk.prepare(Own())
    prepared(torch.ones(5, 40))
    prepared.train()
    with pytest.raises(RuntimeError, match="serves only"):
        prepared(torch.ones(5, 40))


@pytest.mark.parametrize("rows", [5, 30, 200])
@pytest.mark.parametrize("units", [(16, 8), (200, 100)])
def test_in_bfloat16_nothing_is_kept(units: tuple[int, int], rows: int) -> None:
    """Also of layers whose outputs are no whole groups, which kernels bring into another form at each call."""
    torch.manual_seed(0)
    model: Any = mk.nn.MMoE(40, 2, units, num_experts=3).bfloat16().eval()
    prepared, x = mk.prepare(model), torch.randn(rows, 40).bfloat16()
    serve(prepared, x)
    for p in prepared.parameters():
        p.data.add_(0.2)
    model.load_state_dict(prepared.state_dict())
    assert_serves_as(model, prepared, x)
    assert_serves_as(model.float(), prepared.float(), x.float())


@requires.kept_weights
@pytest.mark.parametrize("how", ("in place", "load_state_dict", "under inference_mode", "to", "strides"))
def test_notices_what_is_counted(how: str) -> None:
    with torch.inference_mode(how == "under inference_mode"):
        prepared: Any = mk.prepare(trunk())
        x = torch.randn(200, 40)
        serve(prepared, x)
        if how == "in place":
            with torch.no_grad():
                prepared.levels[0].experts[1].linears[0].weight[3, 4] += 1
        elif how == "to":
            prepared.double().float()
        elif how == "strides":
            weight = prepared.levels[0].experts[1].linears[0].weight
            weight.data = weight.data.reshape(weight.shape[::-1]).t()
        else:
            prepared.load_state_dict(prepared.state_dict())
    with pytest.raises(RuntimeError, match="changed, or moved.*after mtlkernels.prepare.*prepare the model again"):
        prepared(x)
    again = mk.prepare(prepared)
    assert_serves_as(copy.deepcopy(prepared), again, x)


@requires.kept_weights
def test_a_weight_that_is_widened_again() -> None:
    """What was prepared of all columns is not read as if it were of the first ones."""
    prepared: Any = mk.prepare(trunk())
    x, weights = torch.randn(200, 40), [p for p in prepared.levels[0].parameters() if p.shape[1:] == (40,)]
    serve(prepared, x)
    whole = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data[:, :8]
    with torch.no_grad(), pytest.raises(RuntimeError, match="prepare the model again"):
        prepared.levels[0](x[:, :8])
    for weight, data in zip(weights, whole, strict=True):
        weight.data = data
    assert_serves_as(copy.deepcopy(prepared), prepared, x)


def test_parameters_of_inference_mode_are_copied_as_others() -> None:
    with torch.inference_mode():
        model = trunk().eval()
    prepared, x = mk.prepare(model), torch.randn(200, 40)
    assert not any(p.is_inference() for p in prepared.parameters())
    assert_serves_as(model, prepared, x)


def test_copies_and_pickles_are_models_like_any_other() -> None:
    """They own their weights, of which nothing is kept, and go on refusing to train."""
    prepared = mk.prepare(trunk().eval())
    x = torch.randn(200, 40)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        serve(other, x)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        expected = serve(copy.deepcopy(other), x)
        assert all(torch.equal(a, b) for a, b in zip(serve(other, x), expected, strict=True))
        with pytest.raises(RuntimeError, match="serves only"):
            other.train()(x)


@requires.cpp_kernels
def test_what_is_kept_goes_with_the_copy() -> None:
    """Another model at the addresses of a copy that is gone is served from its own weights."""
    x = torch.randn(200, 40)
    for seed in range(6):
        torch.manual_seed(seed)
        prepared = mk.prepare(trunk())
        assert_serves_as(copy.deepcopy(prepared), prepared, x)
        del prepared
        gc.collect()


@requires.kept_weights
def test_what_is_kept_is_made_again_when_it_was_let_go() -> None:
    model, x = trunk(), torch.randn(200, 40)
    prepared = mk.prepare(model)
    expected = serve(prepared, x)
    assert release() > 0
    assert all(torch.equal(a, b) for a, b in zip(serve(prepared, x), expected, strict=True))
    # Others beside it, among them one whose weights are not counted.
    serve(model.eval(), x)
    with torch.inference_mode():
        uncounted = trunk()
        assert_serves_as(copy.deepcopy(uncounted), mk.prepare(uncounted), x)


def test_a_converted_model() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(40, 48), nn.ReLU()) for _ in range(3))
            self.gates = nn.ModuleList(nn.Linear(40, 3) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
            return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]

    mk.convert.register(
        Gated, experts=lambda m: m.experts, gates=lambda m: m.gates, routing=lambda m: mk.Routing.mmoe(3, 2)
    )
    model = nn.Sequential(Gated()).eval()
    converted = copy.deepcopy(model)
    mk.convert(converted)
    assert_serves_as(model, mk.prepare(converted), torch.ones(200, 40))


def test_a_reverted_copy_trains() -> None:
    """Converted anew it is a model like any other."""
    prepared = mk.prepare(converted())
    mk.revert(prepared)
    assert "replaced" in str(mk.convert(prepared))
    prepared.train()([torch.randn(64, 40)] * 2, torch.randn(64, 40))


@pytest.mark.parametrize("change", [lambda p: p.to(torch.int8), lambda p: p.to("meta")], ids=["int8", "meta"])
def test_parameters_that_no_kernel_takes_stay(change: Any) -> None:
    model = trunk()
    model.codes = nn.Parameter(change(torch.ones(4, 4)), requires_grad=False)
    serve(mk.prepare(model), torch.randn(5, 40))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        mk.prepare(3)  # type: ignore[arg-type]
