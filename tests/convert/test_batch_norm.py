"""Models whose experts and gates have batch norm and dropout: folded in evaluation, fused in training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.agreement import assert_converts
from tests.convert.models import by_name, features, mmoe, ple, rechub_mmoe, rechub_ple
from tests.ops.agreement import assert_as_exact

# float32 results that differ by less than a few roundings are the same.
FLOOR = 8 * torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """A model, the experts of each of its levels, and features [B, F] as it takes them."""

    make: Callable[[], Any]
    experts: list[int]
    features: Callable[[Tensor], Any]


def deepctr(make: Any, experts: list[int], **options: Any) -> Case:
    return Case(lambda: make(dnn_use_bn=True, **options), experts, lambda x: x)


CASES = {
    "deepctr PLE": deepctr(ple, [8, 8], dnn_dropout=0.3),
    "deepctr PLE with gates of one layer": deepctr(
        ple, [11], gate_dnn_hidden_units=(), num_levels=1, specific_expert_num=3
    ),
    "deepctr MMOE": deepctr(mmoe, [4], dnn_dropout=0.1, gate_dnn_hidden_units=(6, 5)),
    "deepctr MMOE with SiLU": deepctr(mmoe, [4], dnn_activation=nn.SiLU, expert_dnn_hidden_units=(8,)),
    "rechub PLE": Case(lambda: rechub_ple(dropout=0.2), [8, 8], by_name),
    "rechub PLE of three levels, two tasks": Case(
        lambda: rechub_ple(levels=3, tasks=2, specific=3, shared=1, dims=(9,)), [7, 7, 7], by_name
    ),
    "rechub PLE with sigmoid": Case(lambda: rechub_ple(levels=1, activation="sigmoid", dims=(9, 8, 7)), [8], by_name),
    "rechub PLE without shared experts": Case(lambda: rechub_ple(levels=1, shared=0), [6], by_name),
    "rechub MMOE": Case(lambda: rechub_mmoe(dropout=0.2), [4], by_name),
    "rechub MMOE with leaky ReLU": Case(
        lambda: rechub_mmoe(activation="leakyrelu", experts=3, dims=(8,)), [3], by_name
    ),
}
SOME = ("deepctr PLE", "deepctr MMOE", "rechub PLE", "rechub MMOE")


def inputs(case: Case, rows: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return case.features(features(rows, seed).to(dtype))


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).norm().item() / (exact.norm().item() or 1.0)


def assert_serves(converted: Any, case: Case, rows: tuple[int, ...] = (1, 2, 7, 33, 300)) -> None:
    """The converted model in evaluation agrees with float64 as the library's own does."""
    model = copy.deepcopy(converted)
    assert mk.revert(model).reverted
    exact = copy.deepcopy(model).double()
    for m in (converted, model, exact):
        m.eval()
    for count in rows:
        expected = exact(inputs(case, count, dtype=torch.float64))
        original, found = model(inputs(case, count)), converted(inputs(case, count))
        assert found.shape == original.shape
        assert error(found, expected) <= 3 * error(original, expected) + FLOOR, count


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_serves_as_the_library(name: str, grad: bool, fused_calls: list[int]) -> None:
    case = CASES[name]
    model = case.make()
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    report = mk.convert(model)
    assert not report.left_alone, report
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    with torch.set_grad_enabled(grad):
        for rows in (1, 127, 128):
            fused_calls.clear()
            model.eval()(inputs(case, rows))
            assert fused_calls == (case.experts if not grad or rows >= 128 else [])  # see _fusing.may_fold
        assert_serves(model, case)


def without_dropout(model: Any) -> Any:
    """Other random numbers drop in fused experts, so that only a model that drops nothing can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def arguments(case: Case) -> Any:
    return lambda rows, seed, dtype: (inputs(case, rows, seed, dtype),)


FEW_OR_MANY = [(name, rows) for i, name in enumerate(CASES) for rows in ((7, 40), (300,))[i % 2]]


@pytest.mark.parametrize("name, rows", FEW_OR_MANY)
def test_trains_as_the_library(name: str, rows: int) -> None:
    """Outputs, gradients, parameters, statistics, the optimizer's state; and what is served afterwards."""
    case = CASES[name]
    assert_converts(without_dropout(case.make()), arguments(case), rows)


@pytest.mark.parametrize("name", CASES)
def test_training_is_fused(name: str, fused_calls: list[int]) -> None:
    case = CASES[name]
    model = case.make()
    mk.convert(model)
    model(inputs(case, 150)).sum().backward()
    assert fused_calls[-len(case.experts) :] == case.experts


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_statistics_as_batch_norm_keeps_them(momentum: float | None) -> None:
    """Momenta, modules without scale and shift or without statistics."""
    model, case = without_dropout(rechub_ple()), CASES["rechub PLE"]
    for mlp in (*model.cgc_layers[0].experts_specific, *model.cgc_layers[0].experts_shared):
        mlp.mlp[1].momentum = mlp.mlp[5].momentum = momentum
    for mlp in (*model.cgc_layers[1].experts_specific, *model.cgc_layers[1].experts_shared):
        mlp.mlp[1] = nn.BatchNorm1d(12, affine=False)
        mlp.mlp[5] = nn.BatchNorm1d(7, track_running_stats=False)
    assert_converts(model, arguments(case), serve=(33, 300))


@pytest.mark.parametrize("name", SOME)
def test_dropout_in_training(name: str) -> None:
    """Of fused experts: anew at each call, the same after the same seed, and right on average."""
    case = CASES[name]
    model = case.make()
    for norm in norms(model):
        norm.eval()  # a statistic that is no function of the other rows
    mk.convert(model)
    drop_free = without_dropout(copy.deepcopy(model))
    x = inputs(case, 150)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], drop_free(x))


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_evaluation(name: str) -> None:
    """Fine-tuning with frozen statistics: gradients reach batch norm's weights through what is folded."""
    case = CASES[name]
    model = case.make().eval()
    exact, converted = copy.deepcopy(model).double(), copy.deepcopy(model)
    mk.convert(converted)
    grads = []
    for m, dtype in ((exact, torch.float64), (model, torch.float32), (converted, torch.float32)):
        m(inputs(case, 150, dtype=dtype)).square().sum().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    assert [{n: g is None for n, g in found.items()} for found in grads[1:]] == [
        {n: g is None for n, g in grads[0].items()}
    ] * 2
    scale = max(g.norm().item() for g in grads[0].values() if g is not None)
    for n, expected in grads[0].items():
        if expected is not None:
            # A bias in front of softmax has a gradient that is a sum of nearly nothing.
            original, found = ((g[n].double() - expected).norm().item() for g in grads[1:])
            assert found <= 3 * original + FLOOR * (expected.norm().item() + scale / 100), n


@pytest.mark.parametrize(
    ("name", "parts"), [("deepctr PLE", "batch norm and dropout 0.3"), ("rechub PLE", "batch norm and dropout 0.2")]
)
def test_reports_say_what_is_fused(name: str, parts: str) -> None:
    for line, gates in zip(mk.convert(CASES[name].make()).replaced, (4, 3), strict=True):
        assert line.detail == f"8 experts of 2 layers with {parts} and {gates} gates in one expert_mixture"


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("name", SOME)
def test_copies_fold_their_own_weights(name: str, copied: Callable[[Any], Any], fused_calls: list[int]) -> None:
    case = CASES[name]
    model = case.make().eval()
    mk.convert(model)
    expected = model(inputs(case))
    other = copied(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    fused_calls.clear()
    assert torch.equal(other(inputs(case)), expected)
    assert fused_calls == case.experts
    mk.revert(other)
    assert type(other) is type(case.make())
    torch.testing.assert_close(other(inputs(case)), expected)


def scaled(model: Any) -> dict[str, Tensor]:
    return {key: value * 1.25 if value.is_floating_point() else value for key, value in model.state_dict().items()}


def data_and_eval(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)
    model.eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(scaled(model)),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(scaled(model), assign=True),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "in place": lambda model: [p.mul_(1.25) for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()],
    "data, then eval": data_and_eval,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SOME[1:3])
def test_is_never_stale(name: str, change: str) -> None:
    case = CASES[name]
    model = case.make().eval()
    mk.convert(model)
    before = model(inputs(case))
    CHANGES[change](model)
    assert not torch.allclose(model(inputs(case)), before, rtol=1e-4)
    assert_serves(model, case, (9,))


def norms(model: Any) -> list[Any]:
    """The batch norms of a model's experts and gates, in order."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d) and "tower" not in name]


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_a_hook_that_comes_later_is_called(name: str, fused_calls: list[int]) -> None:
    case = CASES[name]
    model = case.make().eval()
    mk.convert(model)
    expected = model(inputs(case))
    fused_calls.clear()
    seen: list[Tensor] = []
    handle = norms(model)[0].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(inputs(case)), expected)
    assert len(seen) == 1
    assert fused_calls == case.experts[1:]  # PLE's other level stays fused
    handle.remove()
    assert torch.equal(model(inputs(case)), expected)


@pytest.mark.parametrize("name", SOME)
def test_one_row_in_training_fails_as_before(name: str) -> None:
    case = CASES[name]
    model = case.make()
    mk.convert(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(inputs(case, 1))


def test_frozen_batch_norm_is_fused_in_training(fused_calls: list[int]) -> None:
    model, case = rechub_ple(), CASES["rechub PLE"]
    for norm in norms(model):
        norm.eval()
    expected = copy.deepcopy(model)(inputs(case, 150))
    mk.convert(model)
    fused_calls.clear()
    torch.testing.assert_close(model(inputs(case, 150)), expected)
    assert fused_calls == [8, 8]


def without_statistics(model: Any) -> Any:
    sequential = model.cgc_layers[1].experts_shared[1].mlp
    sequential[1] = nn.BatchNorm1d(12, track_running_stats=False)
    return model


def exchanged(model: Any) -> Any:
    expert = model.cgc_layers[1].experts_specific[0].mlp
    expert[0], expert[1], expert[4] = nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 7)
    return model


def hooked(model: Any) -> Any:
    model.cgc_layers[1].gates_specific[0].register_forward_hook(lambda *_: None)
    return model


def layer_norm(model: Any) -> Any:
    model.cgc_layers[1].gates_specific[2].mlp[1] = nn.LayerNorm(4)
    return model


def synchronized(model: Any) -> Any:
    model.cgc_layers[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model.cgc_layers[1])
    return model


@torch.no_grad()
def test_a_level_with_a_hook_is_left_alone(fused_calls: list[int]) -> None:
    model, case = hooked(rechub_ple()).eval(), CASES["rechub PLE"]
    expected = model(inputs(case))
    report = mk.convert(model)
    fused_calls.clear()
    assert [line.path for line in report.replaced] == ["cgc_layers.0"]
    assert [(line.path, line.detail) for line in report.left_alone] == [
        ("cgc_layers.1", "gates_specific.0 has a hook, and would not be called")
    ]
    torch.testing.assert_close(model(inputs(case)), expected)
    assert fused_calls == [8]


@torch.no_grad()
@pytest.mark.usefixtures("any_rows")
@pytest.mark.parametrize(
    ("change", "calls"),
    [(without_statistics, [8, 7, 1]), (exchanged, [8, 1, 7]), (hooked, [8]), (layer_norm, [8, 8]), (synchronized, [8])],
)
def test_what_changes_after_the_conversion_is_seen(change: Any, calls: list[int], fused_calls: list[int]) -> None:
    model, case = rechub_ple().eval(), CASES["rechub PLE"]
    mk.convert(model)
    change(model).eval()
    other = copy.deepcopy(model)
    mk.revert(other)
    fused_calls.clear()
    torch.testing.assert_close(model(inputs(case)), other(inputs(case)))
    assert fused_calls == calls


def test_a_shared_gate_that_nothing_trains() -> None:
    report = mk.convert(rechub_ple(shared=0))
    assert [line.path for line in report.replaced] == ["cgc_layers.1"]
    assert [line.detail for line in report.left_alone] == ["without shared experts nothing trains its shared gate"]


class Unusual(nn.PReLU):
    """What a subclass does nobody knows."""


@pytest.mark.parametrize("activation", ["softmax", Unusual])
def test_activations_that_are_not_known(activation: Any) -> None:
    name = activation if isinstance(activation, str) else activation.__name__.lower()
    for make in (rechub_ple, rechub_mmoe):
        for line in mk.convert(make(activation=activation)).replaced:
            assert f"experts as modules, because of {name} " in line.detail.lower()


def test_versions_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_rechub

    monkeypatch.setattr(torch_rechub, "__version__", "1.0.0")
    for make in (rechub_ple, rechub_mmoe):
        lines = mk.convert(make()).left_alone
        assert {line.detail for line in lines} == {"torch-rechub 1.0.0 is not known, 0.9.0 is"}


# torch.compile's backend uses torch.jit.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@torch.no_grad()
def test_compiles(fresh_compiler: None) -> None:
    case = CASES["rechub PLE"]
    model = case.make().eval()
    mk.convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs(case)), model(inputs(case)))
    norms(model)[0].running_mean.add_(1)
    torch.testing.assert_close(compiled(inputs(case)), model(inputs(case)))


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_autocast(name: str) -> None:
    case = CASES[name]
    model = case.make().eval()
    exact = copy.deepcopy(model).double()(inputs(case, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs(case))
        mk.convert(model)
        found = model(inputs(case))
    assert_as_exact(found, exact, expected)
