"""expert_mixture with gates that are linear layers, against the same logits computed outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import Case, CaseFactory, evaluate
from tests.ops.agreement import assert_agrees, reference_op
from tests.ops.derivatives import function_of_leaves
from tests.ops.level.definition import formula
from tests.ops.level.gate_layers import ROUTING, by_layers, by_logits, check, random_layers, with_layers


@pytest.mark.parametrize("grad", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("seed", range(16))
def test_random_cases(seed: int, grad: bool, dtype: torch.dtype, backend: str) -> None:
    with mk.use_backend(backend):
        check(seed, dtype, grad)


@pytest.mark.parametrize("isa", _extension.instruction_sets()[:-1])
@pytest.mark.parametrize("grad", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("seed", range(40, 55))
def test_every_instruction_set(seed: int, grad: bool, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        check(seed, dtype, grad)


@pytest.mark.parametrize("isa", _extension.instruction_sets())
@pytest.mark.parametrize("rows", [3, 70, 1100])
@pytest.mark.parametrize("experts", [15, 16, 17, 41])
def test_many_experts(experts: int, rows: int, isa: str, dtype: torch.dtype) -> None:
    """More logits than a tile of products has, and a number of inputs that fills none."""
    case = with_layers(
        CaseFactory(experts, dtype), rows, [67, 5, 3], streams=False, routing=mk.Routing.mmoe(experts, 2)
    )
    with _extension.instruction_set(isa):
        assert_agrees(by_layers, formula, case, partial(reference_op, by_logits))


@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_inputs_that_are_parts_of_wider_rows(isa: str, dtype: torch.dtype) -> None:
    """To the bit as copies of them."""
    arguments = with_layers(CaseFactory(0, dtype), 70, [40, 5, 3], streams=False).arguments
    part = torch.randn(70, 60).to(dtype)[:, 7:47]
    found = []
    with _extension.instruction_set(isa):
        for x in (part, part.contiguous()):
            ys = by_layers(**{**arguments, "inputs": x.requires_grad_()})
            found.append(torch.autograd.grad(ys, [x, *arguments["gate_weights"]], [torch.ones_like(y) for y in ys]))
    assert all(map(torch.equal, *found))


def small(seed: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of the leaves of a call with few rows, in float64."""
    case = with_layers(CaseFactory(seed, torch.float64), 3, [3, 4, 2], activation="tanh", streams=seed % 2 > 0)
    return function_of_leaves(by_layers, case)


@pytest.mark.parametrize("seed", [0, 1])
def test_derivatives(seed: int, backend: str) -> None:
    call, leaves = small(seed)
    with mk.use_backend(backend):
        assert gradcheck(call, leaves)
        assert gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_batched_gradients(seed: int, backend: str) -> None:
    call, leaves = small(seed)
    with mk.use_backend(backend):
        ys = call(*leaves)
        directions = [torch.randn(4, *y.shape, dtype=y.dtype) for y in ys]
        found = torch.autograd.grad(ys, leaves, directions, is_grads_batched=True, retain_graph=True)
        for i in range(4):
            one = torch.autograd.grad(ys, leaves, [d[i] for d in directions], retain_graph=True)
            for got, want in zip(found, one, strict=True):
                torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("seed", [0, 1])
def test_func(seed: int, backend: str) -> None:
    call, leaves = small(seed)

    def loss(*values: Tensor) -> Tensor:
        return sum(y.square().sum() for y in call(*values))  # type: ignore[return-value]

    values = [leaf.detach() for leaf in leaves]
    with mk.use_backend(backend):
        found = torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)
        expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", [["inputs"], ["weights"], ["biases"], ["gate_weights"], ["gate_biases", "inputs"]])
def test_frozen_arguments(frozen: list[str], backend: str) -> None:
    case = Case(random_layers(5, torch.float32), torch.float32)
    with mk.use_backend(backend):
        full = evaluate(by_layers, case)
        for name, leaves in case.leaves().items():
            for leaf in leaves:
                leaf.requires_grad_(name.partition("[")[0] not in frozen)
        found = evaluate(by_layers, case)
    torch.testing.assert_close(found, {name: full[name] for name in found})


def test_experts_without_a_gate(backend: str) -> None:
    """Their gradients are zero, and they are not evaluated."""
    routing = mk.Routing((0, 0, 0), ((2, 0),))
    x, weight = torch.randn(4, 3), torch.randn(3, 5, 3, requires_grad=True)
    with torch.no_grad():
        weight[1] = float("nan")
    gate = torch.randn(2, 3, requires_grad=True)
    with mk.use_backend(backend):
        (y,) = mk.expert_mixture(x, [weight], None, None, routing, gate_weights=[gate])
        y.sum().backward()
    assert torch.isfinite(y).all() and gate.grad is not None and gate.grad.any()
    assert weight.grad is not None and not weight.grad[1].any() and weight.grad[0].any()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low: torch.dtype, backend: str) -> None:
    """As by hand: all but the routing in the low dtype; gradients in float32."""
    case = Case(random_layers(6, torch.float32), torch.float32)

    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast("cpu", low):
            return by_layers(**arguments)

    def by_hand(**arguments: Any) -> Any:
        return by_layers(**Case(arguments, low).map(lambda t: t.to(low)).arguments)

    with mk.use_backend(backend):
        got, expected = evaluate(under_autocast, case), evaluate(by_hand, case)
    assert {y.dtype for y in got["outputs"]} == {low}
    for name, group in expected.items():
        for a, b in zip(got[name], group, strict=True):
            assert name == "outputs" or a.dtype == torch.float32
            torch.testing.assert_close(a, b)


def test_kept_graph(backend: str) -> None:
    call, leaves = small(0)
    with mk.use_backend(backend):
        total = sum(y.square().sum() for y in call(*leaves))
        first = torch.autograd.grad(total, leaves, retain_graph=True)  # type: ignore[arg-type]
        second = torch.autograd.grad(total, leaves)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_serving_in_inference_mode() -> None:
    arguments = random_layers(1, torch.float32)
    with torch.inference_mode():
        assert all(y.is_inference() for y in by_layers(**arguments))


def test_more_experts_than_features(backend: str) -> None:
    """A gate that is wider than every layer."""
    make = CaseFactory(0, torch.float32)
    routing = mk.Routing.mmoe(40, 2)
    arguments = dict(make.expert_mixture(3, [2, 3], routing, streams=False).arguments)
    del arguments["gate_logits"]
    gates = [make.leaf(40, 2) for _ in range(2)]
    with mk.use_backend(backend), torch.no_grad():
        found = by_layers(**arguments, gate_weights=gates)
        expected = by_logits(**arguments, gate_weights=gates, gate_biases=None)
    torch.testing.assert_close(found, expected)


def test_a_subclass() -> None:
    """A tensor subclass sees its operators: it does not take the short way."""

    class Counted(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    arguments = random_layers(2, torch.float32)
    arguments["inputs"] = torch.randn(3, arguments["weights"][0][0].shape[1]).as_subclass(Counted)
    with torch.no_grad():
        by_layers(**arguments)
    assert Counted.calls > 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad: bool) -> None:
    arguments = random_layers(4, torch.float32)
    with torch.set_grad_enabled(grad):
        found = torch.compile(lambda a: by_layers(**a), fullgraph=True, backend="aot_eager")(dict(arguments))
        expected = by_layers(**arguments)
    torch.testing.assert_close(found, expected)


MISTAKES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("both", {"gate_logits": torch.zeros(6, 11)}, ValueError, "gate_logits must be None where gate_weights are given"),
    ("neither", {"gate_weights": None, "gate_biases": None}, TypeError, "gate_logits must be .*, got NoneType"),
    ("biases alone", {"gate_weights": None}, ValueError, "gate_biases must be None without gate_weights"),
    ("a kind", {"gate_weights": 3.0}, TypeError, "gate_weights must be a tensor or a sequence .*, got float"),
    ("too few", {"gate_weights": [torch.zeros(3, 4)]}, ValueError, "gate_weights must hold .* 3 gates, got 1"),
    ("rows", {"gate_weights": torch.zeros(10, 4)}, ValueError, r"gate_weights must have 11 rows, .* got \[10, 4\]"),
    ("width", {"gate_weights": torch.zeros(11, 5)}, ValueError, r"gate_weights\[0\] must have shape \[3, 4\], got"),
    ("dtype", {"gate_weights": torch.zeros(11, 4).double()}, TypeError, r"gate_weights\[0\] must have the dtype of"),
    ("none", {"gate_weights": [None] * 3}, TypeError, r"gate_weights\[0\] must be a tensor .*, got NoneType"),
    ("few biases", {"gate_biases": [None]}, ValueError, "gate_biases must hold an entry for each of 3 gates, got 1"),
    ("bias shape", {"gate_biases": [torch.zeros(2), None, None]}, ValueError, r"gate_biases\[0\] .*\[3\], got \[2\]"),
    ("bias kind", {"gate_biases": [1.0, None, None]}, TypeError, r"gate_biases\[0\] must be a tensor .*, got float"),
]


@pytest.mark.parametrize("_, change, error, message", MISTAKES, ids=[name for name, *_ in MISTAKES])
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(_: str, change: dict[str, Any], error: type[Exception], message: str, grad: bool) -> None:
    arguments = {
        "inputs": torch.zeros(6, 4),
        "weights": [torch.zeros(5, 3, 4)],
        "biases": None,
        "gate_logits": None,
        "routing": ROUTING,
        "gate_weights": torch.zeros(11, 4),
        "gate_biases": torch.zeros(11),
        **change,
    }
    with pytest.raises(error, match=message), torch.set_grad_enabled(grad):
        mk.expert_mixture(**arguments)


def test_fewer_streams_than_gates() -> None:
    routing = mk.Routing((0, 1), ((0,), (1,), (0, 1)))
    with pytest.raises(ValueError, match="gate_weights need an input for each of 3 gates, or one for all"):
        mk.expert_mixture(
            [torch.zeros(2, 4)] * 2, [torch.zeros(2, 3, 4)], None, None, routing, gate_weights=torch.zeros(4, 4)
        )
