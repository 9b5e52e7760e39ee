"""What a conversion leaves as it was, what it refuses, and what it says about it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.models import MMOE, PLE, features, fill, make, mmoe, ple


def x32(rows: int = 9) -> Tensor:
    return features(rows).float()


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class OwnTowers(PLE):
    """A user's model with a forward of its own that reads the shared stream of the last level."""

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        streams = [X[:, 3:].repeat(1, 5)[:, : self.input_dim]] * (self.num_tasks + 1)
        for level in range(self.num_levels):
            streams = self.cgc_net(streams, level)
        assert len(streams) == self.num_tasks + 1
        return torch.cat(streams, 1)


class OwnLevel(PLE):
    """A user's model with a level of its own."""

    def cgc_net(self, inputs: Any, level_num: int) -> Any:
        return super().cgc_net(inputs, level_num)


class OwnForward(MMOE):
    """A user's MMOE with a forward of its own."""

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        return super().forward(X)


@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_each_level_is_one_call(make_model: Any, fused_calls: list[int]) -> None:
    model = make_model()
    report = mk.convert(model)
    model(x32())
    assert fused_calls == ([8, 8] if make_model is ple else [4])
    assert len(report.replaced) == len(fused_calls)


def test_reports_read_well() -> None:
    model = nn.ModuleDict({"ranker": ple(dnn_dropout=0.1), "other": nn.Linear(2, 2)})
    assert str(mk.convert(model)).splitlines() == [
        f"replaced    ranker  PLE level {level}: 8 experts of 2 layers with dropout 0.1 and {gates} gates in one "
        "expert_mixture"
        for level, gates in ((0, 4), (1, 3))
    ]
    assert str(mk.convert(model)) == "left alone  ranker  FusedPLE: already converted"
    assert str(mk.revert(model)) == "reverted    ranker  FusedPLE: PLE again"
    assert str(mk.revert(model)) == "left alone  (model)  ModuleDict: nothing in it is converted"


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("make_model", [ple, mmoe, lambda: make(OwnTowers)])
def test_copies_are_converted_and_read_their_own_weights(
    make_model: Any, copied: Callable[[Any], Any], fused_calls: list[int]
) -> None:
    model = make_model()
    mk.convert(model)
    expected = model(x32())
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(other(x32()), expected)
    if copied is not copy.copy:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    fused_calls.clear()
    assert torch.equal(other(x32()), expected)
    assert fused_calls
    assert mk.revert(other).reverted
    assert type(other) is type(make_model())
    torch.testing.assert_close(other(x32()), expected)


@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_weights_are_never_stale(make_model: Any) -> None:
    """Loaded, assigned, moved to another dtype, changed in place: the next call sees it."""
    plain, model = make_model(), make_model()
    mk.convert(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.7)
    for assign in (False, True):
        model.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True, assign=assign)
        torch.testing.assert_close(model(x32()), plain(x32()))
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(1.1)
    torch.testing.assert_close(model.double()(features(9)), reverted_copy(model)(features(9)))


def reverted_copy(model: Any) -> Any:
    """The library's own model with the same weights."""
    other = copy.deepcopy(model)
    mk.revert(other)
    return other


@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_optimizers_made_before_go_on(make_model: Any) -> None:
    plain, model = make_model(), make_model()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (plain, model)]
    mk.convert(model)
    for _ in range(3):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x32()).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x32()), plain(x32()))


# torch.compile itself instantiates an autograd Function as it traces it, and its backend uses torch.jit.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_compiles_and_exports(make_model: Any, fresh_compiler: None) -> None:
    model = make_model()
    mk.convert(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 12):
        found, expected = compiled(x32(rows)), model(x32(rows))
        grads = [torch.autograd.grad(y.square().sum(), list(model.tower_dnn.parameters())) for y in (found, expected)]
        torch.testing.assert_close((found, *grads[0]), (expected, *grads[1]))
    exported = torch.export.export(model.eval(), (x32(9),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x32(12)), model(x32(12)))


@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_dropout_is_fused(make_model: Any, fused_calls: list[int]) -> None:
    model = make_model(dnn_dropout=0.4)
    mk.convert(model)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(model(x32(20)))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert fused_calls
    other = reverted_copy(model)
    torch.testing.assert_close(model.eval()(x32()), other.eval()(x32()))


@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_hooks_that_come_later_are_called(make_model: Any, fused_calls: list[int]) -> None:
    model = make_model()
    mk.convert(model)
    expected = model(x32())
    fused_calls.clear()
    experts = model.specific_experts[0][1] if make_model is ple else model.expert_dnn
    seen: list[Tensor] = []
    handle = experts[1].linears[0].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x32()), expected)
    assert len(seen) == 1
    assert fused_calls == ([8] if make_model is ple else [])  # the other level of PLE stays fused
    handle.remove()
    assert torch.equal(model(x32()), expected)


def test_hooks_on_gates_are_called() -> None:
    model = ple()
    mk.convert(model)
    seen: list[str] = []
    model.specific_gate_dnn[0][1][0].register_forward_hook(lambda *_: seen.append("hidden"))
    model.shared_gate_dnn_final_layer[0].register_forward_hook(lambda *_: seen.append("final"))
    model(x32())
    assert seen == ["hidden", "final"]


def test_a_subclass_with_its_own_forward_gets_the_shared_stream_of_the_last_level(fused_calls: list[int]) -> None:
    model = make(OwnTowers)
    expected = model(x32())
    assert len(mk.convert(model).replaced) == 2
    torch.testing.assert_close(model(x32()), expected)
    assert isinstance(model, OwnTowers)
    assert len(fused_calls) == 2


def hooked(model: Any) -> Any:
    model.specific_experts[1][0][0].activation_layers[1].register_forward_pre_hook(lambda *_: None)
    return model


def test_a_level_with_a_hook_is_left_alone(fused_calls: list[int]) -> None:
    model = hooked(ple())
    expected = model(x32())
    report = mk.convert(model)
    assert [line.part for line in report.replaced] == ["PLE level 0"]
    (line,) = report.left_alone
    assert (line.part, line.detail) == (
        "PLE level 1",
        "specific_experts.1.0.0.activation_layers.1 has a hook, and would not be called",
    )
    torch.testing.assert_close(model(x32()), expected)
    assert fused_calls == [8]


def with_version(model: Any) -> Any:
    sys.modules["deepctr_torch"].__version__ = "0.9.1"
    return model


def instance_method(model: Any) -> Any:
    model.cgc_net = model.cgc_net
    return model


@pytest.mark.parametrize(
    ("make_model", "reasons"),
    [
        (lambda: ple(shared_expert_num=0), ["without shared experts nothing trains its shared gates"]),
        (lambda: make(OwnLevel), ["cgc_net is not that of deepctr-torch"]),
        (lambda: make(OwnForward, num_experts=2), ["forward is not that of deepctr-torch"]),
        (lambda: instance_method(ple()), ["cgc_net is not that of deepctr-torch"]),
        (lambda: with_version(ple()), ["deepctr-torch 0.9.1 is not known, 0.3.0 is"]),
    ],
)
def test_a_model_is_left_alone(make_model: Any, reasons: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["deepctr_torch"], "__version__", "0.3.0")
    model = make_model()
    kind = type(model)
    expected = model(x32())
    report = mk.convert(model)
    assert [line.detail for line in report.left_alone] == reasons
    assert not report.replaced
    assert type(model) is kind
    assert not any(name.startswith("_mtlkernels") for name in vars(model))
    assert torch.equal(model(x32()), expected)


def test_more_shared_experts_than_the_library_makes() -> None:
    """The library's own forward fails; the report says why."""
    model = ple(shared_expert_num=3)
    with pytest.raises(IndexError):
        model(x32())
    (line,) = mk.convert(model).left_alone
    assert line.detail == "shared_expert_num is 3, but deepctr-torch made 2, as many as specific_expert_num"


def test_nothing_known() -> None:
    (line,) = mk.convert(nn.Linear(2, 2)).lines
    assert line.action == "left alone"
    assert line.detail.startswith("nothing in it is known; known are deepctr_torch.models.multitask.mmoe.MMOE, ")


@pytest.mark.parametrize("function", [mk.convert, mk.revert])
def test_not_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        function({})


@pytest.mark.parametrize("make_model", [ple, mmoe])
def test_revert_leaves_no_trace(make_model: Any) -> None:
    model = make_model()
    kind, attributes, expected = type(model), set(vars(model)), model(x32())
    mk.convert(model)
    assert type(model) is not kind
    mk.revert(model)
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert torch.equal(model(x32()), expected)
    assert mk.convert(model).replaced


def test_a_class_changed_again_is_not_reverted() -> None:
    model = ple()
    mk.convert(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    (line,) = mk.revert(model).lines
    assert (line.action, line.detail) == ("left alone", "its class was changed again after its conversion")


def test_models_inside_models_and_twice_the_same() -> None:
    shared = fill(ple())
    model = nn.ModuleList([shared, mmoe(), shared])
    assert [line.path for line in mk.convert(model).replaced] == ["0", "0", "1"]
    assert [line.path for line in mk.revert(model).reverted] == ["0", "1"]


def test_convert_does_not_import_the_library() -> None:
    program = (
        "import sys, torch, mtlkernels as mk; print(mk.convert(torch.nn.Linear(1, 1)));"
        "assert not any(name.startswith('deepctr') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], capture_output=True)
