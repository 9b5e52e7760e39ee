"""Calls of a level that keep what was read of its modules: the same numbers, and never those of what was before."""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mtlkernels as mk
from mtlkernels import _extension
from tests.nn.serving import DTYPES, TRUNKS, are_kept, equal, fresh, kept, levels, serve
from tests.ops.agreement import assert_as_exact

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


@pytest.mark.parametrize("isa", _extension.instruction_sets() or [""])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRUNKS)
def test_the_same_bits(name: str, kind: torch.dtype, isa: str) -> None:
    with _extension.instruction_set(isa):
        model = kept(name, kind)
        for rows in (0, 1, 2, 5, 8, 9, 16, 40, 100):
            x = torch.randn(rows, 20).to(kind)
            assert equal(serve(model, x), serve(fresh(model), x))
            strided = torch.randn(20, rows).to(kind).t()
            assert equal(serve(model, strided), serve(fresh(model), strided))
        assert are_kept(model)
        x = torch.randn(30, 20).to(kind)
        with mk.use_backend("reference"):
            exact = serve(fresh(model).double(), x.double())
            plain = serve(model, x)
        assert_as_exact(serve(model, x), exact, plain)


def _gate_of_one_level(level: Any) -> nn.Linear:
    found = level.gates if isinstance(level.gates, nn.Linear) else level.gates[0]
    assert isinstance(found, nn.Linear)
    return found


def _new_gate(level: Any) -> None:
    gate = _gate_of_one_level(level)
    gate.weight = nn.Parameter(-gate.weight.detach())


def _gate_data(level: Any) -> None:
    gate = _gate_of_one_level(level)
    gate.weight.data = gate.weight.detach() * 2


def _bias_of_a_gate(level: Any) -> None:
    gate = _gate_of_one_level(level)
    gate.bias = nn.Parameter(torch.arange(float(gate.out_features)))


def _hook_on_a_gate(level: Any) -> None:
    _gate_of_one_level(level).register_forward_hook(lambda module, args, y: -3 * y)


def _forward_of_a_gate(level: Any) -> None:
    gate = _gate_of_one_level(level)
    gate.forward = types.MethodType(lambda own, x: -3 * nn.Linear.forward(own, x), gate)  # type: ignore[method-assign]


def _swapped_experts(level: Any) -> None:
    experts = level.experts._modules
    experts["0"], experts["1"] = experts["1"], experts["0"]


def _new_expert(level: Any) -> None:
    level.experts[1] = copy.deepcopy(level.experts[0])


def _new_layer(level: Any) -> None:
    old = level.experts[1].linears[0]
    level.experts[1].linears[0] = nn.Linear(old.in_features, old.out_features)


def _no_bias(level: Any) -> None:
    level.experts[1].linears[0].bias.data.fill_(5)
    level.experts[1].linears[0].bias = None


def _strides(level: Any) -> None:
    weight = level.experts[1].linears[0].weight
    weight.data = (2 * weight.detach()).t().contiguous().t()


def _in_place(level: Any) -> None:
    level.experts[1].linears[0].weight.detach().mul_(2)


def _activation(level: Any) -> None:
    level.activation = "silu"
    for expert in level.experts:
        expert._code = mk.ops.activations.CODES["silu"]


def _routing(level: Any) -> None:
    gates = tuple(tuple(reversed(gate)) for gate in level.routing.gate_experts)
    level.routing = mk.Routing(level.routing.expert_inputs, gates)


CHANGES = [
    _new_gate,
    _gate_data,
    _bias_of_a_gate,
    _hook_on_a_gate,
    _forward_of_a_gate,
    _swapped_experts,
    _new_expert,
    _new_layer,
    _no_bias,
    _strides,
    _in_place,
    _activation,
    _routing,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TRUNKS)
def test_changes_are_noticed(name: str, change: Callable[[Any], None]) -> None:
    """At the next call, and at all that follow it, of which some are kept again."""
    model, x = kept(name), torch.randn(6, 20)
    level = levels(model)[0]
    before = serve(level, x)
    change(level)
    found = [serve(level, x) for _ in range(8)]
    assert not equal(found[0], before), "the change changed nothing, so that this test cannot fail"
    with torch.no_grad():
        exact = fresh(level).double()._by_modules([x.double()])
    for outputs in found:
        for y, true in zip(outputs, exact, strict=True):
            torch.testing.assert_close(y.double(), true, rtol=1e-4, atol=1e-5)


def test_a_tensor_that_is_transposed_where_it_is() -> None:
    model = mk.nn.MMoE(20, 2, (20,), num_experts=2).eval()
    x = torch.randn(4, 20)
    before = [serve(model, x) for _ in range(4)][-1]
    assert are_kept(model)
    weight: Any = levels(model)[0].experts[1].linears[0].weight
    address = weight.data_ptr()
    weight.data = weight.detach().t()
    assert weight.data_ptr() == address
    after = serve(model, x)
    assert not equal(after, before) and equal(after, serve(fresh(model), x))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_that_are_computed(batch_norm: bool) -> None:
    """From a parameter that lies where it lay, while its values change."""
    model, x = TRUNKS["MMoE"](batch_norm=batch_norm).eval(), torch.randn(6, 20)
    layer: Any = model.level.experts[0].linears[0]
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    for factor in (1.0, 2.0, 0.5):
        layer.parametrizations.weight.original.detach().mul_(factor)
        for _ in range(6):
            assert equal(serve(model, x), serve(fresh(model), x))


def test_dropout_that_drops_again() -> None:
    model, x = kept("MMoE", dropout=0.5), torch.randn(64, 20)
    expected = serve(model, x)
    assert equal(serve(model, x), expected)
    model.train()
    assert not equal(serve(model, x), expected)
    assert not equal(serve(model, x), serve(model, x))
    model.eval()
    assert equal(serve(model, x), expected)


def test_gradients_are_recorded_where_they_are_wanted() -> None:
    model, x = kept("CGC"), torch.randn(5, 20)
    expected = serve(model, x)
    trained = model(x)
    assert all(y.grad_fn is not None for y in trained)
    for y, true in zip(trained, expected, strict=True):
        torch.testing.assert_close(y.detach(), true)
    assert are_kept(model)
    prepared: Any = mk.prepare(model)
    assert not any(y.requires_grad for y in prepared(x))
    assert all(y.requires_grad for y in prepared(x.clone().requires_grad_()))


def _statistics(norm: Any) -> None:
    norm.running_mean.fill_(0.7)


def _new_statistics(norm: Any) -> None:
    norm.running_var = torch.full_like(norm.running_var, 9.0)


def _weight_of_a_norm(norm: Any) -> None:
    norm.weight.data = norm.weight.detach() * 3


def _eps(norm: Any) -> None:
    norm.eps = 2.0


def _no_statistics(norm: Any) -> None:
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


@pytest.mark.parametrize("change", [_statistics, _new_statistics, _weight_of_a_norm, _eps, _no_statistics])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_changes_of_a_norm_are_noticed(kind: torch.dtype, change: Callable[[Any], None]) -> None:
    options = {"batch_norm": True, "dropout": 0.3}
    model, x = kept("PLE", kind, **options), torch.randn(6, 20).to(kind)
    before = serve(model, x)
    assert equal(before, serve(fresh(model), x))
    change(levels(model)[0].experts[1].norms[0])
    found = [serve(model, x) for _ in range(8)]
    assert not equal(found[0], before) and all(equal(outputs, found[0]) for outputs in found)
    assert equal(found[0], serve(fresh(model), x))


@pytest.mark.parametrize("options", [{"activation": "prelu"}, {"gate_units": (8,)}], ids=str)
def test_other_levels_go_the_usual_way(options: dict[str, Any]) -> None:
    model, x = TRUNKS["MMoE"](**options).eval(), torch.randn(3, 20)
    outputs = [serve(model, x) for _ in range(6)]
    assert not are_kept(model) and all(equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("name", TRUNKS)
def test_hooks_on_a_level_run(name: str) -> None:
    """Of one level and of all modules, and a method in the place of its own, once a call; and then no longer."""
    model, x = kept(name), torch.randn(3, 20)
    level = levels(model)[0]
    expected = serve(model, x)
    heard: list[Any] = []

    def hear(module: Any, *_: Any) -> None:
        if module is level:
            heard.append(module)

    for register in (
        level.register_forward_hook,
        level.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(hear)
        assert equal(serve(model, x), expected) and len(heard) == 1, register
        handle.remove()
        assert equal(serve(model, x), expected) and len(heard) == 1, register
        heard.clear()
    handle = level.register_forward_hook(lambda module, args, outputs: tuple(2 * y for y in outputs))
    assert not equal(serve(model, x), expected)
    handle.remove()
    level.forward = types.MethodType(lambda own, inputs: tuple(-y for y in type(own).forward(own, inputs)), level)
    assert not equal(serve(model, x), expected)
    del level.forward
    assert equal(serve(model, x), expected) and are_kept(model)


def test_another_module_in_the_place_of_a_level() -> None:
    model, x = kept("MMoE"), torch.randn(3, 20)
    model.level = nn.Identity()
    with torch.no_grad():
        assert model(x) is x


def test_bad_input_is_refused_as_ever() -> None:
    model = kept("MMoE")
    for bad in (torch.randn(3, 21), torch.randn(20), torch.randn(3, 20).double()):
        with pytest.raises((TypeError, ValueError)) as usual:
            serve(fresh(model), bad)
        with pytest.raises(usual.type) as found:
            serve(model, bad)
        assert str(found.value) == str(usual.value)
    for wrong in ([torch.randn(3, 20)], (torch.randn(3, 20),)):
        with pytest.raises(TypeError, match="x must be a"), torch.no_grad():
            model(wrong)
    level = levels(model)[0]
    for bad in ([], [1], 1, None):
        for own in (level, levels(fresh(model))[0]):
            with pytest.raises((TypeError, ValueError, AttributeError, IndexError)), torch.no_grad():
                own(bad)
    assert are_kept(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_who_looks_on_sees_the_operators() -> None:
    model, x = kept("MMoE"), torch.randn(3, 20)
    expected = serve(model, x)
    exported = torch.export.export(model, (x,)).module()
    assert any("mtlkernels" in str(node.target) for node in exported.graph.nodes)  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.dtype == torch.bfloat16 for y in serve(model, x))
    for seen in (exported, torch.jit.trace(model, (x,), check_trace=False)):
        for y, true in zip(serve(seen, x), expected, strict=True):
            torch.testing.assert_close(y, true)


def test_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = kept("MMoE")
    with caplog.at_level(logging.DEBUG, "mtlkernels"):
        mk.log_decisions()
        serve(model, torch.randn(3, 20))
        found = [record for record in caplog.records if getattr(record, "op", "") == "expert_mixture"]
    mk.log_decisions()
    assert [record.implementation for record in found] == ["cpp"]  # type: ignore[attr-defined]
