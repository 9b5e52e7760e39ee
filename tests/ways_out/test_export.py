"""``torch.export`` and ``make_fx`` keep the operators; all is plain under ``use_backend("reference")``.

AOTInductor, which takes a compiler half a minute, is run by the snippets of ``docs/deployment.md``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mtlkernels as mk
from mtlkernels import _tracing
from tests.ways_out.kinds import (
    ALL,
    CONVERTED,
    MIXTURES,
    ROUTES,
    SNRS,
    TRUNKS,
    WIDTH,
    assert_same,
    names_of,
    parameters_of,
)

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


TRAINED: dict[str, Callable[[], Any]] = {
    "MMoE": lambda: mk.nn.MMoE(WIDTH, 2, (5,), num_experts=2, batch_norm=True),
    "PLE of two levels with dropout": lambda: mk.nn.PLE(
        WIDTH, 2, (6, 5), num_levels=2, num_specific=1, num_shared=1, batch_norm=True, dropout=0.3
    ),
}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # how PyTorch 2.10 loads programs
@pytest.mark.parametrize(
    ("name", "strict"), [("MMoE", False), ("MMoE", True), ("PLE of two levels with dropout", False)]
)
def test_a_program_of_training_is_saved_and_loaded(name: str, strict: bool) -> None:
    """Its outputs, gradients and running statistics are the model's."""
    model, x = TRAINED[name]().train(), torch.randn(9, WIDTH)
    program = torch.export.export(model, (torch.randn(5, WIDTH),), dynamic_shapes=({0: ROWS},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded: Any = torch.export.load(file).module()
    results = []
    for module in (loaded, model):
        torch.manual_seed(1)
        results.append(module(x))
        sum(y.square().sum() for y in results[-1]).backward()
    assert_same(*results)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(key).grad, parameter.grad)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(loaded.get_buffer(key), buffer)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["gated_mixture", "snr_trans", "snr_aver", "SNR Trans", "PLE"])
def test_a_program_has_the_gradients_of_the_model(name: str, strict: bool) -> None:
    model, x = KINDS[name].model(), KINDS[name].inputs(9, 1)
    program: Any = torch.export.export(model, KINDS[name].inputs(5, 0), dynamic_shapes=({0: ROWS},), strict=strict)
    exported = program.module()
    for module in (exported, model):
        sum(y.square().sum() for y in module(*x)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        torch.testing.assert_close(exported.get_parameter(key).grad, parameter.grad)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("op", ["snr_aver", "snr_trans"])
def test_closed_routes_of_a_program_have_no_gradient_where_none_is_asked(op: str, strict: bool) -> None:
    class Routes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [0.5, 0.0]]))

        def forward(self, x: Any) -> Any:
            if op == "snr_aver":
                return (*mk.snr_aver([x, x + 1], self.z, closed_grad=False),)
            return (*mk.snr_trans([x, x + 1], [[torch.eye(2)] * 2] * 2, self.z, closed_grad=False),)

    x = torch.ones(3, 2)
    program: Any = torch.export.export(Routes(), (x,), strict=strict).module()
    sum(y.sum() for y in program(x)).backward()
    assert program.z.grad.tolist() == [[0.0, 12.0], [6.0, 0.0]]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["CGC with batch norm", "gated_mixture", "snr_aver"])
def test_transforms_of_a_program(name: str, grad: bool) -> None:
    """torch.func differentiates its module as it does the model, also where it was exported to serve."""
    kind = ALL[name]
    model, x = kind.model().double(), kind.inputs(5, 0)[0].double()
    with torch.set_grad_enabled(grad):
        program: Any = torch.export.export(model, (x,)).module()
    parameters = parameters_of(model)

    def loss(module: Any) -> Callable[[Any, torch.Tensor], Any]:
        return lambda given, x: sum(y.square().sum() for y in torch.func.functional_call(module, given, (x,)))

    of_batches = torch.func.vmap(torch.func.grad(loss(program)), (None, 0))(parameters, torch.stack([x, x * 2]))
    for i, scaled in enumerate((x, x * 2)):
        for key, expected in torch.func.grad(loss(model))(parameters, scaled).items():
            torch.testing.assert_close(of_batches[key][i], expected)
    second = torch.func.hessian(loss(program), 1)(parameters, x)
    torch.testing.assert_close(second, torch.func.hessian(loss(model), 1)(parameters, x))


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
