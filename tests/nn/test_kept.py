"""Calls of a level that keep what was read of its modules: the same numbers, and never those of what was before."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.nn.level import TrunkLevel
from mtlkernels.ops.level.kept import KeptCalls
from tests.ops.agreement import assert_as_exact

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRUNKS: dict[str, Callable[..., Any]] = {
    "MMoE": lambda **options: mk.nn.MMoE(20, 3, (24, 16), num_experts=4, **options),
    "CGC": lambda **options: mk.nn.CGC(20, 2, (24,), num_specific=2, num_shared=1, **options),
    "PLE": lambda **options: mk.nn.PLE(20, 2, (24, 20), num_specific=1, num_shared=2, num_levels=2, **options),
}


def levels(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TrunkLevel)]


def keeps(level: Any) -> bool:
    return level._calls._kept is not None or level._calls._trunk is not None


def are_kept(model: nn.Module) -> bool:
    return all(map(keeps, levels(model)))


def serve(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(x))


def kept(name: str = "PLE", kind: torch.dtype = torch.float32, **options: Any) -> Any:
    """A trunk that has served until its calls are kept."""
    model = TRUNKS[name](**options).to(kind).eval()
    for _ in range(2):
        assert not are_kept(model)
        serve(model, torch.ones(3, 20, dtype=kind))
    assert are_kept(model)
    return model


def fresh(model: Any) -> Any:
    """A copy, of which nothing is kept."""
    found = copy.deepcopy(model)
    assert not any(map(keeps, levels(found)))
    return found


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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


def test_nothing_is_kept_alive() -> None:
    model, x = kept("MMoE"), torch.randn(5, 20)
    layer = model.level.experts[0].linears[0]
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    gc.collect()
    assert old() is None
    assert equal(serve(model, x), serve(fresh(model), x))
    gone = weakref.ref(model.level)
    del model, layer
    gc.collect()
    assert gone() is None


def test_parameters_may_be_swapped() -> None:
    model, x = kept("MMoE"), torch.randn(5, 20)
    layer = model.level.experts[0].linears[0]
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros_like(layer.weight)))
    assert equal(serve(model, x), serve(fresh(model), x))


def test_copies_keep_nothing() -> None:
    model, x = kept("PLE"), torch.randn(5, 20)
    expected = serve(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(map(keeps, levels(other)))
        assert all(equal(serve(other, x), expected) for _ in range(4)) and are_kept(other)
    assert are_kept(model)
    assert not any("_calls" in key for key in model.state_dict())
    shallow = copy.copy(levels(model)[0])
    assert shallow._calls is levels(model)[0]._calls
    shallow._modules = dict(shallow._modules)
    shallow.experts = copy.deepcopy(shallow.experts)
    with torch.no_grad():
        for expert in shallow.experts:
            for parameter in expert.parameters():
                parameter.zero_()
        for _ in range(8):
            assert not any(y.any() for y in shallow(x))
            assert equal(serve(model, x), expected)


def test_modules_that_keep_changing_are_seldom_read() -> None:
    model, x = TRUNKS["MMoE"]().eval(), torch.randn(2, 20)
    own = {name: p.detach() for name, p in model.named_parameters()}
    other = {name: -p for name, p in own.items()}
    with torch.no_grad():
        expected = [list(functional_call(model, parameters, (x,))) for parameters in (own, other)]
    with (
        mock.patch.object(KeptCalls, "keep_trunk", autospec=True, side_effect=KeptCalls.keep_trunk) as keep,
        torch.no_grad(),
    ):
        for i in range(3000):
            parameters = [own, other][i % 2]
            for y, true in zip(functional_call(model, parameters, (x,)), expected[i % 2], strict=True):
                assert torch.equal(y, true)
        assert 2 <= keep.call_count <= 24
    assert all(equal(serve(model, x), expected[0]) for _ in range(3))


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


def test_bad_input_is_refused_as_ever() -> None:
    model = kept("MMoE")
    for bad in (torch.randn(3, 21), torch.randn(20), torch.randn(3, 20).double()):
        with pytest.raises((TypeError, ValueError)) as usual:
            serve(fresh(model), bad)
        with pytest.raises(usual.type) as found:
            serve(model, bad)
        assert str(found.value) == str(usual.value)
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


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_that_go_while_others_serve(batch_norm: bool) -> None:
    """Memory that nobody else holds any more is held until the call is over."""
    model = mk.nn.MMoE(256, 2, (512, 64), num_experts=4, batch_norm=batch_norm).eval()
    x = torch.randn(2, 256)
    layer: Any = model.level.experts[3].linears[0]
    values = [layer.weight.detach().clone(), torch.zeros_like(layer.weight)]
    expected = []
    for value in values:
        layer.weight = nn.Parameter(value.clone())
        expected.append(serve(fresh(model), x))
    wrong: list[list[Tensor]] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            found = serve(model, x)
            if not any(equal(found, true) for true in expected):
                wrong.append(found)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(600):
        fill = torch.full_like(values[0], 1e6)  # takes the memory of a weight that is gone
        layer.weight = nn.Parameter(values[i % 2].clone())
        del fill
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_threads_at_once() -> None:
    model = kept("PLE")
    inputs = [torch.randn(rows, 20) for rows in (1, 4, 16, 50)]
    expected = [serve(model, x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(200):
            if not equal(serve(model, inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):  # what is kept may go while others serve by it
        for level in levels(model):
            level._calls._kept = level._calls._trunk = None
            level._calls = KeptCalls()
    for thread in threads:
        thread.join()
    assert not wrong
