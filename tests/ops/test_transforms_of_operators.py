"""Transforms of torch.func over operators that are called directly, as exported programs call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from tests.ops.level import operator

# Forward-mode differentiation is itself made of torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
OPERATORS = torch.ops.mtlkernels


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


EXPERTS, LOGITS, GATES = double(4, 3, 2), [double(4, 2), double(4, 3)], ([0, 1, 0, 1, 2], [2, 3])
U, Z, MATRICES = double(2, 3, 2), double(2, 2).abs(), double(4, 2, 2)
Z[0, 1] = 0.0  # a closed route, whose z has a derivative
GRADS, ORDER = double(4, 3), torch.tensor([[1], [0]])
CONFLICT = torch.tensor([[1.0, 0.5, -0.2], [-0.7, 0.3, 0.4]], dtype=torch.float64)
OPTIONS = (False, None, False, True, 1e-12, False)


def total(outputs: Any) -> Tensor:
    """A scalar with second derivatives."""
    return sum(y.square().sum() for y in outputs)  # type: ignore[no-any-return]


def of_level(operands: operator.Operands, at: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """level_forward as a function of one of its tensors."""

    def run(value: Tensor) -> Tensor:
        tensors = [*operands.tensors[:at], value, *operands.tensors[at + 1 :]]
        outputs, _ = operator.Operands(operands.spec, tensors, operands.seed).results(False)
        return total(outputs)

    value = operands.tensors[at]
    assert value is not None
    return run, value


LEVEL = operator.with_gate_layers(torch.float64, 4, False)
NORMS = operator.with_norms(torch.float64, 4, False)


def of_serve() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """level_serve as a function of the scales of its first layer."""
    inputs, parameters, gates, ints, floats, _, _ = LEVEL.forward(False)
    parameters = [*parameters[:6], *[None] * 6]
    others, shifts = [double(3, 3), None, None], [double(3, 5), double(3, 3), None, None]

    def run(scale: Tensor) -> Tensor:
        scales = [scale, *others]
        return total(OPERATORS.level_serve(inputs, parameters, gates, scales, shifts, ints, floats))

    return run, double(3, 5)


def of_serve_without_norms() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """level_serve as a function of a weight, with neither scales nor shifts."""
    inputs, parameters, gates, ints, floats, _, _ = LEVEL.forward(False)
    nothing = [None] * 4

    def run(weight: Tensor) -> Tensor:
        return total(OPERATORS.level_serve(inputs, [weight, *parameters[1:]], gates, nothing, nothing, ints, floats))

    weight = parameters[0]
    assert weight is not None
    return run, weight


# A scalar function of one argument of an operator, and a value.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "gated_mixture, experts": (lambda x: total(OPERATORS.gated_mixture_forward(x, LOGITS, *GATES)), EXPERTS),
    "gated_mixture, logits": (
        lambda x: total(OPERATORS.gated_mixture_forward(EXPERTS, [x, LOGITS[1]], *GATES)),
        LOGITS[0],
    ),
    "level, an input": of_level(LEVEL, 0),
    "level, a weight": of_level(LEVEL, 6),
    "level, a gate": of_level(LEVEL, 15),
    "level with norms and dropout, an input": of_level(NORMS, 0),
    "level_serve, a scale": of_serve(),
    "level_serve without norms, a weight": of_serve_without_norms(),
    "snr_trans, u": (lambda x: total(OPERATORS.snr_trans_forward(list(x), list(MATRICES), Z)), U),
    "snr_trans, weights": (lambda x: total(OPERATORS.snr_trans_forward(list(U), list(x), Z)), MATRICES),
    "snr_trans, z": (lambda x: total(OPERATORS.snr_trans_forward(list(U), list(MATRICES), x)), Z),
    "snr_aver, u": (lambda x: total(OPERATORS.snr_aver_forward(list(x), Z)), U),
    "snr_aver, z": (lambda x: total(OPERATORS.snr_aver_forward(list(U), x)), Z),
    "pcgrad_gram": (lambda x: total([OPERATORS.pcgrad_gram(list(x), 2)]), GRADS),
    "pcgrad_weights": (lambda x: total(OPERATORS.pcgrad_weights(x @ x.t(), ORDER, *OPTIONS)), CONFLICT),
    "pcgrad_combine": (lambda x: total(OPERATORS.pcgrad_combine(list(GRADS), 2, x)), double(2)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_operator(name: str) -> None:
    """The derivatives that autograd gives, first and second ones, in float64."""
    function, value = CASES[name]
    twice = torch.stack([value, value * 1.5])
    expected, other = (torch.autograd.functional.jacobian(function, v) for v in twice)
    assert expected.abs().max() > 0
    torch.testing.assert_close(grad(function)(value), expected)
    torch.testing.assert_close(jacrev(function)(value), expected)
    torch.testing.assert_close(jacfwd(function)(value), expected)
    torch.testing.assert_close(vmap(grad(function))(twice), torch.stack([expected, other]))
    torch.testing.assert_close(grad(lambda v: vmap(function)(v).sum())(twice), torch.stack([expected, other]))
    second = torch.autograd.functional.hessian(function, value)
    torch.testing.assert_close(hessian(function)(value), second)
    torch.testing.assert_close(jacrev(jacrev(function))(value), second)


def test_a_transform_of_something_else() -> None:
    """The inner one differentiates nothing that the operator takes, the outer one does."""
    function, value = CASES["gated_mixture, experts"]
    found = grad(lambda v: grad(lambda factor: function(v) * factor)(double(1)[0]))(value)
    torch.testing.assert_close(found, grad(function)(value))


def test_under_the_compiler() -> None:
    function, value = CASES["level, a weight"]
    compiled: Any = torch.compile(vmap(grad(function)), backend="aot_eager", fullgraph=True)
    twice = torch.stack([value, value * 1.5])
    torch.testing.assert_close(compiled(twice), vmap(grad(function))(twice))
