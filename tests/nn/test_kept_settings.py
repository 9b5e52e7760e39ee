"""What lies in the modules of a level whose calls are kept, beside parameters: kept or not, and then compared."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mtlkernels import _extension
from tests.nn.serving import TRUNKS, are_kept, equal, fresh, kept, levels, serve
from tests.seeding import seed

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")
X = torch.ones(3, 20)


def plain(x: Any) -> Any:
    return x


def with_default(x: Any, factor: float = 2.0) -> Any:
    return factor * x


def with_module(x: Any, module: Any = nn.ReLU()) -> Any:  # noqa: B008
    return module(x)


def with_keyword(x: Any, *, factor: float = 2.0) -> Any:
    return factor * x


def closure() -> Callable[[], Any]:
    held = [1]
    return lambda: held


class Fields(dict[str, int]):
    """A dictionary of another class."""


class Layer(nn.Linear):
    """A layer of another class, with the same fields."""


# Of each kind two, neither of which is the other.
SETTINGS: dict[str, tuple[Any, Any]] = {
    "None": (None, True),
    "int": (1000, 1001),
    "float": (2.5, 3.5),
    "complex": (1j, 2j),
    "bytes": (b"a", b"b"),
    "str": ("a", "b"),
    "dtype": (torch.float16, torch.int8),
    "device": (torch.device("cpu"), torch.device("meta")),
    "layout": (torch.strided, torch.sparse_coo),
    "type": (int, float),
    "function of C": (len, math.sqrt),
    "method of a class": (int.from_bytes, dict.fromkeys),
    "function": (plain, with_default),
    "sequence": ([1, (2, "a")], [1, (2, "b")]),
    "length": ([1, 2], [1, 2, 3]),
    "kind of sequence": ([1], (1,)),
    "dictionary": ({"a": 1}, {"a": 2}),
    "key": ({"a": 1}, {"b": 1}),
    "entries": ({"a": 1}, {"a": 1, "b": 2}),
    "kind of dictionary": ({"a": 1}, OrderedDict(a=1)),
    "empty dictionary": ({}, {"a": 1}),
    "no dictionary": ({}, 1),
    "tensor": (torch.ones(2), torch.ones(2)),
    "no tensor": (torch.ones(2), 1),
    "module": (nn.ReLU(), nn.ReLU()),
}
NOT_KEPT = {
    "object": object(),
    "method of an object": [].append,
    "closure": closure(),
    "function with a keyword": with_keyword,
    "function with a module": with_module,
    "within a sequence": [1, object()],
    "within a dictionary": {"a": object()},
    "kind of dictionary": Fields(a=1),
    "key": {(1, 2): 1},
    "parametrizations": {"parametrizations": 1},
    "sparse tensor": torch.ones(2).to_sparse(),
}


def expert_of(model: Any) -> Any:
    return levels(model)[0].experts[1]


def with_setting(value: Any) -> Any:
    """A level whose call is kept with all that its modules hold; one of them holds that, too."""
    model = TRUNKS["MMoE"](batch_norm=True).eval()
    expert_of(model).setting = value
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_compared(name: str) -> None:
    before, after = SETTINGS[name]
    model = with_setting(before)
    expected = [serve(model, X) for _ in range(4)][-1]
    assert are_kept(model)
    if isinstance(before, nn.Module):
        del expert_of(model).setting  # PyTorch keeps modules elsewhere
    expert_of(model).setting = after
    assert equal(serve(model, X), expected) and not are_kept(model)


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_may_change_where_it_lies_is_not_kept(name: str) -> None:
    model = with_setting(NOT_KEPT[name])
    expected = serve(model, X)
    assert all(equal(serve(model, X), expected) for _ in range(6))
    assert not are_kept(model)


class Doubled(torch.Tensor):
    """A tensor that layers multiply with twice."""

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, kinds, args, kwargs or {})
        return 2 * found if func is nn.functional.linear else found


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}], ids=["trunk", "modules"])
def test_a_weight_of_another_class_in_the_same_memory(options: dict[str, Any]) -> None:
    model = kept("MMoE", **options)
    layer = expert_of(model).linears[0]
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    with torch.no_grad():
        expected = levels(model)[0]._by_modules([X])
    torch.testing.assert_close(serve(model, X), list(expected))


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}], ids=["trunk", "modules"])
def test_a_name_that_is_no_text(options: dict[str, Any]) -> None:
    model = TRUNKS["MMoE"](**options).eval()
    setattr(expert_of(model), "\ud800", 1)
    expected = serve(model, X)
    assert all(equal(serve(model, X), expected) for _ in range(6))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=["trunk", "modules"])
def test_experts_without_units_are_not_kept(options: dict[str, Any]) -> None:
    model = TRUNKS["MMoE"](**options).eval()
    for expert in levels(model)[0].experts:
        first, last = expert.linears
        first.weight, first.bias = nn.Parameter(torch.empty(0, 20)), nn.Parameter(torch.empty(0))
        last.weight = nn.Parameter(torch.empty(last.out_features, 0))
    expected = serve(model, X)
    assert all(equal(serve(model, X), expected) for _ in range(6)) and not are_kept(model)


def _forward(level: Any) -> None:
    level.experts[1].forward = lambda x: -x


def _hooks(level: Any) -> None:
    level.experts[1]._forward_hooks = None


def _no_hooks(level: Any) -> None:
    del level.experts[1]._backward_hooks


def _class(level: Any) -> None:
    level.experts[1].linears[0].__class__ = Layer


def _order(level: Any) -> None:
    modules = level.experts[1]._modules
    modules["norms"] = modules.pop("norms")


def _another_dictionary(level: Any) -> None:
    level.experts[1]._modules = Fields(level.experts[1]._modules)


def _no_layers(level: Any) -> None:
    del level.experts[1]._modules["linears"]


def _more_layers(level: Any) -> None:
    linears = level.experts[1].linears
    seed(1)
    linears.append(nn.Linear(linears[-1].out_features, linears[-1].out_features))


def _no_weight(level: Any) -> None:
    level.experts[1].linears[0].weight = None


def _class_of_a_gate(level: Any) -> None:
    gates = level.gates if isinstance(level.gates, nn.Linear) else level.gates[1]
    gates.__class__ = Layer


def _hooks_of_a_gate(level: Any) -> None:
    gates = level.gates if isinstance(level.gates, nn.Linear) else level.gates[1]
    gates._forward_pre_hooks = None


def _class_of_gates(level: Any) -> None:
    level._modules["gates"]._modules = Fields(level._modules["gates"]._modules)


def _no_experts(level: Any) -> None:
    del level._modules["experts"]


def _no_gates(level: Any) -> None:
    del level._modules["gates"]


def _no_routing(level: Any) -> None:
    del level.routing


def _no_activation(level: Any) -> None:
    del level.activation


CHANGES = [
    _forward,
    _hooks,
    _no_hooks,
    _class,
    _order,
    _another_dictionary,
    _no_layers,
    _more_layers,
    _no_weight,
    _class_of_a_gate,
    _hooks_of_a_gate,
    _class_of_gates,
    _no_experts,
    _no_gates,
    _no_routing,
    _no_activation,
]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("options", [{}, {"batch_norm": True}], ids=["trunk", "modules"])
@pytest.mark.parametrize("change", CHANGES)
def test_levels_that_are_not_what_they_were(change: Callable[[Any], None], options: dict[str, Any], place: int) -> None:
    """The call goes the way of one of which nothing is kept, whatever that makes of them."""

    def outcome(of: Any) -> Any:
        try:
            return serve(of, X)
        except Exception as error:
            return type(error)

    model = kept("PLE", **options)
    other = fresh(model)
    for each in (model, other):
        change(levels(each)[place])
    for _ in range(4):
        found, expected = outcome(model), outcome(other)
        assert found == expected if isinstance(expected, type) else equal(found, expected)
