"""``torch.export`` and ``make_fx`` keep the operators; all is plain under ``use_backend("reference")``.

AOTInductor, which takes a compiler half a minute, is run by the snippets of ``docs/deployment.md``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mtlkernels as mk
from mtlkernels import _tracing
from tests.ways_out.kinds import ALL, CONVERTED, MIXTURES, ROUTES, SNRS, TRUNKS, assert_same, names_of, parameters_of

KINDS = {**CONVERTED, **TRUNKS, **MIXTURES, **ROUTES, **SNRS}
# Of torch.jit.trace, and of forward-mode differentiation, which is made of torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
ROWS = torch.export.Dim("rows", min=2)


def operators(names: Any) -> set[str]:
    return {name for name in names if "mtlkernels" in name}


@pytest.mark.parametrize("reference", [False, True], ids=["operators", "reference"])
@pytest.mark.parametrize("name", KINDS)
def test_export(name: str, reference: bool) -> None:
    kind = KINDS[name]
    model = kind.model()
    with torch.no_grad():
        program = exported(model, kind.inputs(5, 0), reference)
        assert bool(operators(names_of(program.graph))) != reference
        for count in (2, 40):
            x = kind.inputs(count, count)
            assert_same(program.module()(*x), model(*x))


def exported(model: Any, x: tuple[Any, ...], reference: bool) -> Any:
    if not reference:
        return torch.export.export(model, x, dynamic_shapes=({0: ROWS},))
    with mk.use_backend("reference"):
        return torch.export.export(model, x, dynamic_shapes=({0: ROWS},))


@pytest.mark.parametrize("name", ["rechub PLE", "PLE"])
def test_export_strictly(name: str) -> None:
    kind = KINDS[name]
    model, x = kind.model(), kind.inputs(5, 0)
    with torch.no_grad():
        program = torch.export.export(model, x, dynamic_shapes=({0: ROWS},), strict=True)
        names = names_of(program.graph)
        assert operators(names)
        assert_same(program.module()(*kind.inputs(9, 1)), model(*kind.inputs(9, 1)))


@pytest.mark.parametrize("reference", [False, True], ids=["operators", "reference"])
@pytest.mark.parametrize("name", ["PLE", "expert_mixture with logits", "gated_mixture", "snr_trans", "snr_aver"])
def test_make_fx(name: str, reference: bool) -> None:
    kind = KINDS[name]
    model = kind.model()
    parameters = parameters_of(model)

    def function(given: Any, x: Any) -> Any:
        return torch.func.functional_call(model, given, (x,))

    with torch.no_grad():
        if reference:
            with mk.use_backend("reference"):
                graph = make_fx(function, tracing_mode="symbolic")(parameters, *kind.inputs(5, 0))
        else:
            graph = make_fx(function, tracing_mode="symbolic")(parameters, *kind.inputs(5, 0))
        assert bool(operators(names_of(graph.graph))) != reference
        assert "empty_strided" not in str(names_of(graph.graph))
        scaled = {key: value * 1.25 for key, value in parameters.items()}
        x = kind.inputs(9, 1)
        assert_same(graph(scaled, *x), function(scaled, *x))


@pytest.mark.parametrize("name", ALL)
def test_functional_call(name: str) -> None:
    """Other parameters for one call, under grad and vmap of torch.func too."""
    kind = ALL[name]
    model, other, x = kind.model(), kind.model(), kind.inputs(5, 0)
    scaled = {key: p.detach() * 1.25 for key, p in model.named_parameters()}
    other.load_state_dict(scaled, strict=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(torch.func.functional_call(model, scaled, x), other(*x))


# Modes, which see what goes through the dispatcher ------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("mode", [Seen, Called])
@pytest.mark.parametrize("name", ["PLE", "expert_mixture with gate_weights", "snr_trans", "snr_aver", "rechub PLE"])
def test_modes_see_the_operators(name: str, mode: Any, grad: bool) -> None:
    kind = ALL[name]
    model, x = kind.model(), kind.inputs(300, 0)
    with torch.set_grad_enabled(grad):
        with mode() as seen:
            found = model(*x)
        assert any("mtlkernels" in name for name in seen.names)
        assert_same(found, model(*x))


def test_pcgrad_is_seen() -> None:
    grads = [[torch.randn(9)], [torch.randn(9)]]
    with Seen() as seen:
        mk.pcgrad(grads)
    assert {"mtlkernels.pcgrad_gram.default", "mtlkernels.pcgrad_combine.default"} <= set(seen.names)


def test_who_looks_on() -> None:
    """A default device is a mode that only makes tensors; nothing looks on then."""
    assert not _tracing.observed()
    with torch.device("cpu"):
        assert not _tracing.observed()
        with Called():
            assert _tracing.observed()
    for looking in (Seen(), torch.autograd.forward_ad.dual_level()):
        with looking:
            assert _tracing.observed()
    seen = []
    torch.func.vmap(lambda x: seen.append(_tracing.observed()) or x)(torch.randn(2))
    torch.jit.trace(lambda x: seen.append(_tracing.observed()) or x, torch.randn(2), check_trace=False)
    make_fx(lambda x: seen.append(_tracing.observed()) or x)(torch.randn(2))
    assert seen == [True, True, True]
    assert not _tracing.observed()
