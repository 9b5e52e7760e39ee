"""Weights and biases of a level's experts: C++ takes out what Python would, or leaves it to Python."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.nn.level import Expert, _linears

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


class Own(nn.Linear):
    """A kind of linear layer, such as LoRA's."""


class Weight(nn.Parameter):
    """A kind of parameter, such as a quantized one."""


def in_cpp(experts: nn.ModuleList, heard: bool) -> Any:
    return _extension.function("linears")(experts._modules, Expert, nn.Linear, nn.Parameter, nn.Dropout, heard)


def level(**options: Any) -> Any:
    return mk.nn.CGC(6, 2, (5, 4), num_specific=1, num_shared=1, **options).level.experts


def hook(*_: Any) -> None:
    """One that does nothing."""


def first(experts: Any) -> Any:
    return experts[0].linears[0]


def _replace(experts: Any) -> None:
    experts[1].linears[0] = nn.Linear(6, 5, bias=experts[1].linears[0].bias is not None)


def _own_class(experts: Any) -> None:
    experts[1].linears[0] = Own(6, 5)


def _other_expert(experts: Any) -> None:
    experts[1] = nn.Sequential(nn.Linear(6, 4))


def _more_layers(experts: Any) -> None:
    experts[1].linears.append(nn.Linear(4, 4))


def _own_weight(experts: Any) -> None:
    del first(experts).weight
    first(experts).register_parameter("weight", Weight(torch.zeros(5, 6)))


def _no_weight(experts: Any) -> None:
    first(experts).register_parameter("weight", None)


def _no_bias(experts: Any) -> None:
    first(experts).register_parameter("bias", None)


def _no_bias_of_another(experts: Any) -> None:
    experts[1].linears[0].register_parameter("bias", None)


def _without_linears(experts: Any) -> None:
    del experts[1]._modules["linears"]


def _ordered(experts: Any) -> None:
    experts._modules = collections.OrderedDict(experts._modules)


def _without_parameters(experts: Any) -> None:
    del first(experts).__dict__["_parameters"]


def _without_code(experts: Any) -> None:
    del experts[1].__dict__["_code"]


EDITS: dict[str, Callable[[Any], object]] = {
    "none": lambda _: None,
    "a layer replaced": _replace,
    "a frozen weight": lambda experts: first(experts).weight.requires_grad_(False),
    "a hook on the data": lambda experts: first(experts).weight.register_hook(lambda grad: grad),
}
LEFT_TO_PYTHON: dict[str, Callable[[Any], object]] = {
    "no bias": _no_bias,
    "no bias of another": _no_bias_of_another,
    "a layer of another class": _own_class,
    "an expert of another class": _other_expert,
    "another number of layers": _more_layers,
    "a weight of another class": _own_weight,
    "weight is None": _no_weight,
    "a parametrization": lambda experts: parametrize.register_parametrization(first(experts), "weight", nn.Tanh()),
    "weight norm": lambda experts: nn.utils.parametrizations.weight_norm(first(experts)),
    "no layers": _without_linears,
    "modules in another kind of dictionary": _ordered,
    "no dictionary of parameters": _without_parameters,
    "no code of an activation": _without_code,
}
HEARD: dict[str, Callable[[Any], object]] = {
    "a hook on an expert": lambda experts: experts[1].register_forward_hook(hook),
    "a hook on a layer": lambda experts: first(experts).register_forward_hook(hook),
}


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("options", [{}, {"batch_norm": True}], ids=["with biases", "without biases"])
def test_the_same_objects(edit: str, heard: bool, options: dict[str, Any]) -> None:
    experts = level(**options)
    EDITS[edit](experts)
    found, expected = in_cpp(experts, heard), _linears(experts, heard)
    assert found is not None and expected is not None
    assert len(found[0]) == len(found[1]) == 2
    for mine, wanted in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert (mine is None) == (wanted is None)
        assert wanted is None or all(a is b for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("edit", LEFT_TO_PYTHON)
def test_what_is_not_plain_is_left_to_python(edit: str) -> None:
    experts = level()
    LEFT_TO_PYTHON[edit](experts)
    assert in_cpp(experts, heard=False) is None and in_cpp(experts, heard=True) is None


@pytest.mark.parametrize("edit", HEARD)
def test_hooks_count_where_gradients_are_recorded(edit: str) -> None:
    experts = level()
    HEARD[edit](experts)
    assert in_cpp(experts, heard=True) is None and _linears(experts, True) is None
    assert in_cpp(experts, heard=False) is not None


@pytest.mark.parametrize("edit", [_no_bias, _no_bias_of_another])
def test_biases_that_not_all_have(edit: Callable[[Any], object]) -> None:
    """Such experts are called as modules: none of the biases is left out."""
    model = mk.nn.CGC(6, 2, (5, 4), num_specific=1, num_shared=1)
    edit(model.level.experts)
    assert _linears(model.level.experts, True) is None
    x = torch.randn(3, 6)
    expected = model.level._by_modules([x])
    with torch.no_grad():
        served = model(x)
    for y, one_row, true in zip(model(x), served, expected, strict=True):
        torch.testing.assert_close(y, true)
        torch.testing.assert_close(one_row, true)


@pytest.mark.parametrize("rate", [0, 0.0, 0.1, 1])
def test_dropout_that_drops_nothing(rate: float) -> None:
    """A whole number counts as one."""
    experts = level()
    for expert in experts:
        expert.dropout.p = rate
    assert in_cpp(experts, heard=True)[2] == _linears(experts, True)[2] == (rate == 0)  # type: ignore[index]


NOT_BARE: dict[str, Callable[[Any], object]] = {
    "no dropout": lambda expert: expert._modules.pop("dropout"),
    "no norms": lambda expert: expert._modules.pop("norms"),
    "no rate": lambda expert: expert.dropout.__dict__.pop("p"),
    "a rate that is no number": lambda expert: setattr(expert.dropout, "p", True),
}


@pytest.mark.parametrize("edit", NOT_BARE.values(), ids=NOT_BARE)
def test_what_may_drop_or_normalize_is_taken_to_do_so(edit: Callable[[Any], object]) -> None:
    experts = level().train()
    edit(experts[1])
    assert in_cpp(experts, heard=True)[2] is False


def test_where_hooks_should_be_may_be_some() -> None:
    experts = level()
    del experts[1].__dict__["_forward_hooks"]
    assert in_cpp(experts, heard=True) is None
    assert in_cpp(experts, heard=False) is not None


def test_a_whole_number_as_dropout() -> None:
    sub_networks = mk.nn.SNR(6, 2, (5, 4), (2, 2), dropout=0).levels[0].experts
    assert type(sub_networks[0].dropout.p) is float and in_cpp(sub_networks, heard=True)[2]


def test_objects_that_are_no_modules_are_left_to_python() -> None:
    for experts in ({"0": object()}, {"0": 1}, [], None):
        assert _extension.function("linears")(experts, Expert, nn.Linear, nn.Parameter, nn.Dropout, True) is None


def test_no_experts_and_many_layers() -> None:
    assert in_cpp(nn.ModuleList(), heard=True) == ([], [], True)
    experts = mk.nn.MMoE(4, 2, (2,) * 65, num_experts=2).level.experts
    assert in_cpp(experts, heard=True) is None  # of as many as that C++ keeps no account
    weights, _, bare = _linears(experts._modules.values(), True)  # type: ignore[misc]
    assert len(weights) == 65 and bare


def test_no_reference_is_lost_or_kept() -> None:
    experts = level()
    weight, bias = first(experts).weight, first(experts).bias
    before = sys.getrefcount(weight), sys.getrefcount(bias)
    for _ in range(100):
        in_cpp(experts, heard=True)
    experts[1].linears[1].register_parameter("weight", None)
    for _ in range(100):
        assert in_cpp(experts, heard=True) is None
    assert (sys.getrefcount(weight), sys.getrefcount(bias)) == before
