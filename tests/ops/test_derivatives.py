"""opcheck, derivatives of every order against finite differences, and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mtlkernels as mk
from mtlkernels.ops.activations import ACTIVATIONS, CODES
from mtlkernels.ops.expert_mixture.autograd import ExpertMixture
from mtlkernels.testing import Case, CaseFactory

# Ragged gates, three streams of which nobody reads the second, and an expert that no gate mixes.
ROUTING = mk.Routing((0, 2, 0, 0), ((2, 0), (1,), (0, 1, 2)))


def gated(dtype: torch.dtype = torch.float64, rows: int = 3, **options: Any) -> Case:
    return CaseFactory(0, dtype, **options).gated_mixture(rows, 3, ROUTING)


def expert(dtype: torch.dtype = torch.float64, rows: int = 3, activation: Any = "tanh", **options: Any) -> Case:
    return CaseFactory(0, dtype).expert_mixture(rows, [3, 2, 2], ROUTING, activation=activation, **options)


def function_of_leaves(op: Callable[..., Any], case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    """The call as a function of its leaves, for gradcheck and torch.func."""
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    place = {id(leaf): i for i, leaf in enumerate(leaves)}

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return op(**case.map(lambda leaf: values[place[id(leaf)]] if id(leaf) in place else leaf).arguments)

    return call, leaves


# opcheck ------------------------------------------------------------------------------------------------------------

CHECKED = [
    (mk.gated_mixture, lambda: gated(torch.float32, 5)),
    (mk.gated_mixture, lambda: gated(torch.bfloat16, 0)),
    (mk.gated_mixture, lambda: gated(torch.float16, 5, layouts=["transposed"])),
    (mk.expert_mixture, lambda: expert(torch.float32, 5, "relu")),
    (mk.expert_mixture, lambda: expert(torch.float32, 1, ["gelu", "none"], biases=[False, True])),
    (mk.expert_mixture, lambda: expert(torch.bfloat16, 0, "silu", biases=False, streams=False)),
]


def operator_arguments(case: Case) -> tuple[Any, ...]:
    """The arguments of the forward operator."""
    values, wiring = case.arguments, ROUTING.wiring
    gates = (list(wiring.gate_experts), list(wiring.gate_sizes))
    if "experts" in values:
        return (values["experts"], values["gate_logits"], [e for gate in ROUTING.gate_experts for e in gate], gates[1])
    layers, live = len(values["weights"]), wiring.live
    weights = [values["weights"][layer][e] for layer in range(layers) for e in live]
    rows = values["biases"] or [None] * layers
    biases = [row[e] if row else None for row in rows for e in live]
    single = isinstance(values["inputs"], Tensor)
    inputs = [values["inputs"]] if single else values["inputs"]
    streams = [0] * len(live) if single else list(wiring.expert_inputs)
    names = [values["activation"]] * layers if isinstance(values["activation"], str) else values["activation"]
    return (inputs, weights, biases, values["gate_logits"], streams, *gates, [CODES[name] for name in names])


@pytest.mark.parametrize("sample", range(len(CHECKED)))
def test_opcheck_forward(sample: int) -> None:
    op, make = CHECKED[sample]
    arguments = operator_arguments(make())
    if op is mk.gated_mixture:
        torch.library.opcheck(torch.ops.mtlkernels.gated_mixture_forward, arguments)
    else:
        for save in (True, False):
            torch.library.opcheck(torch.ops.mtlkernels.expert_mixture_forward, (*arguments, save))


@pytest.mark.parametrize("sample", range(len(CHECKED)))
def test_opcheck_backward(sample: int) -> None:
    op, make = CHECKED[sample]
    arguments = [
        [t.detach() if isinstance(t, Tensor) else t for t in value] if isinstance(value, list) else value
        for value in operator_arguments(make())
    ]
    if op is mk.gated_mixture:
        experts, logits, *gates = arguments
        experts = experts.detach()
        grads = [torch.randn_like(y) for y in torch.ops.mtlkernels.gated_mixture_forward(*arguments)]
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.mtlkernels.gated_mixture_backward, (grads, experts.detach(), logits, *gates, *needs)
            )
    else:
        inputs, weights, biases, logits, *routing = arguments
        outputs, saved = torch.ops.mtlkernels.expert_mixture_forward(*arguments, True)
        grads = [torch.randn_like(y) for y in outputs]
        for needs in (
            (True,) * 4,
            (False, True, False, False),
            (True, False, False, True),
            (False, False, True, False),
        ):
            torch.library.opcheck(
                torch.ops.mtlkernels.expert_mixture_backward,
                (grads, inputs, weights, biases, logits, saved, *routing, *needs),
            )


# Finite differences -------------------------------------------------------------------------------------------------


def test_gradcheck_gated_mixture(backend: str) -> None:
    with mk.use_backend(backend):
        function, leaves = function_of_leaves(mk.gated_mixture, gated())
        gradcheck(function, leaves, check_batched_grad=True)
        gradgradcheck(function, leaves, check_batched_grad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_expert_mixture(activation: str, backend: str) -> None:
    with mk.use_backend(backend):
        function, leaves = function_of_leaves(mk.expert_mixture, expert(activation=activation))
        gradcheck(function, leaves, check_batched_grad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck_expert_mixture(activation: str, backend: str) -> None:
    with mk.use_backend(backend):
        function, leaves = function_of_leaves(mk.expert_mixture, expert(rows=2, activation=activation))
        gradgradcheck(function, leaves, check_batched_grad=activation == "silu")


def test_gradgradcheck_without_biases_and_with_frozen_inputs(backend: str) -> None:
    case = expert(activation=["silu", "none"], biases=[False, True])
    case.arguments["inputs"][0].requires_grad_(False)
    with mk.use_backend(backend):
        function, leaves = function_of_leaves(mk.expert_mixture, case)
        gradgradcheck(function, leaves)


# Outputs that take no part in the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [(1,), (0, 2)])
def test_gradients_of_some_outputs(pair: Any, chosen: tuple[int, ...], backend: str) -> None:
    fused, plain, values = pair
    leaves = [v.clone().requires_grad_() for v in values]
    every = tuple(range(len(values)))

    def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *v: sum((function(*v)[k] ** 2).sum() * (k + 1) for k in chosen)

    def grads(function: Callable[..., Any], **options: Any) -> Any:
        found = torch.autograd.grad(loss(function)(*leaves), leaves, allow_unused=True, **options)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]

    def second(function: Callable[..., Any]) -> Any:
        total = sum(g.square().sum() for g in grads(function, create_graph=True))
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    def by_func(function: Callable[..., Any]) -> Any:
        return torch.func.grad(loss(function), every)(*values)

    def batched(function: Callable[..., Any]) -> Any:
        dims = (0,) * 3 + (None,) * (len(values) - 3)
        rows = [torch.stack([v, 2 * v]) if i < 3 else v for i, v in enumerate(values)]
        return torch.func.vmap(torch.func.grad(loss(function), every), dims)(*rows)

    with mk.use_backend(backend):
        for derivative in (grads, second, by_func, batched):
            assert_same(derivative(fused), derivative(plain))


def test_no_zeros_are_made_for_what_is_saved(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    seen: list[Any] = []
    usual = ExpertMixture.backward
    monkeypatch.setattr(ExpertMixture, "backward", lambda ctx, *grads: seen.append(grads) or usual(ctx, *grads))
    with mk.use_backend(backend):
        outputs = mk.expert_mixture(**expert(torch.float32).arguments)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    (grads,) = seen
    assert [grad is None for grad in grads] == [False] * 3 + [True]


class NoGradient(torch.autograd.Function):
    """The identity, which sends no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_no_gradient_at_all(backend: str) -> None:
    case = expert(torch.float32)
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    with mk.use_backend(backend):
        outputs = mk.expert_mixture(**case.arguments)
        grads = torch.autograd.grad(sum(NoGradient.apply(y).sum() for y in outputs), leaves, allow_unused=True)
    assert all(grad is None for grad in grads)


# torch.func ---------------------------------------------------------------------------------------------------------


def by_eager(**arguments: Any) -> tuple[Tensor, ...]:
    """Plain PyTorch of the same arguments, differentiable and vmappable by itself."""
    routing, names = arguments["routing"], arguments["activation"]
    hidden = [arguments["inputs"][stream] for stream in routing.expert_inputs]
    for layer in range(len(arguments["weights"])):
        name = names if isinstance(names, str) else names[layer]
        act = getattr(torch, name) if name != "none" else torch.clone
        hidden = [
            act(x @ arguments["weights"][layer][e].mT + arguments["biases"][layer][e]) for e, x in enumerate(hidden)
        ]
    return tuple(
        sum(torch.softmax(logits, 1)[:, n, None] * hidden[e] for n, e in enumerate(gate))
        for gate, logits in zip(routing.gate_experts, arguments["gate_logits"], strict=True)
    )


@pytest.fixture(name="pair")
def _pair() -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:
    case = expert(rows=4)
    fused, leaves = function_of_leaves(mk.expert_mixture, case)
    plain, _ = function_of_leaves(by_eager, case)
    return fused, plain, [leaf.detach() for leaf in leaves]


def loss_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *values: sum((y * y).sum() * (k + 1) for k, y in enumerate(function(*values)))


def assert_same(got: Any, expected: Any) -> None:
    flat_got, spec = torch.utils._pytree.tree_flatten(got)
    flat_expected, expected_spec = torch.utils._pytree.tree_flatten(expected)
    assert spec == expected_spec
    for a, b in zip(flat_got, flat_expected, strict=True):
        torch.testing.assert_close(a, b)


def test_func_grad_and_vjp_and_jacrev(pair: Any, backend: str) -> None:
    fused, plain, values = pair
    every = tuple(range(len(values)))
    with mk.use_backend(backend):
        assert_same(torch.func.grad(loss_of(fused), every)(*values), torch.func.grad(loss_of(plain), every)(*values))
        assert_same(torch.func.jacrev(fused, every)(*values), torch.func.jacrev(plain, every)(*values))


def test_func_nested_grad(pair: Any, backend: str) -> None:
    fused, plain, values = pair

    def second(function: Callable[..., Any]) -> Any:
        inner = torch.func.grad(loss_of(function))
        return torch.func.grad(lambda *v: inner(*v).square().sum(), tuple(range(len(values))))(*values)

    with mk.use_backend(backend):
        assert_same(second(fused), second(plain))


def test_func_hessian_by_jacrev_twice(pair: Any, backend: str) -> None:
    fused, plain, values = pair
    with mk.use_backend(backend):
        got = torch.func.jacrev(torch.func.jacrev(loss_of(fused)))(*values)
    assert_same(got, torch.func.jacrev(torch.func.jacrev(loss_of(plain)))(*values))


# The leaves of the case are, in order: 3 inputs, 2 layers of 4 weights, 2 layers of 4 biases, 3 gates' logits.
VMAPPED = {
    "inputs": range(0, 3),
    "one input": [0],
    "weights": range(3, 11),
    "one weight": [4],
    "biases": range(11, 19),
    "logits": range(19, 22),
    "an expert without a gate": [6],
    "everything": range(0, 22),
}


@pytest.mark.parametrize("which", VMAPPED.values(), ids=VMAPPED)
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap(pair: Any, which: Any, dim: int, backend: str) -> None:
    fused, plain, values = pair
    in_dims = tuple(dim if i in which else None for i in range(len(values)))
    generator = torch.Generator().manual_seed(1)
    batched = [
        v if d is None else torch.stack([v, v * 2, v + torch.randn(v.shape, generator=generator, dtype=v.dtype)], dim)
        for v, d in zip(values, in_dims, strict=True)
    ]
    every = tuple(range(len(values)))
    with mk.use_backend(backend):
        assert_same(torch.func.vmap(fused, in_dims)(*batched), torch.func.vmap(plain, in_dims)(*batched))
        got = torch.func.vmap(torch.func.grad(loss_of(fused), every), in_dims)(*batched)
    assert_same(got, torch.func.vmap(torch.func.grad(loss_of(plain), every), in_dims)(*batched))


def test_vmap_of_vmap(pair: Any, backend: str) -> None:
    fused, plain, values = pair
    in_dims = [tuple(0 if i in which else None for i in range(len(values))) for which in (range(0, 3), range(3, 11))]
    batched = [torch.stack([v, 2 * v]) if i < 11 else v for i, v in enumerate(values)]
    with mk.use_backend(backend):
        got = torch.func.vmap(torch.func.vmap(fused, in_dims[0]), in_dims[1])(*batched)
    assert_same(got, torch.func.vmap(torch.func.vmap(plain, in_dims[0]), in_dims[1])(*batched))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (1, 2)])
def test_vmap_gated_mixture(dims: tuple[int | None, int | None], backend: str) -> None:
    routing = mk.Routing.mmoe(3, 2)
    experts, logits = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    batched = [
        t if dim is None else torch.stack([t, 2 * t], dim) for t, dim in zip((experts, logits), dims, strict=True)
    ]

    def fused(experts: Tensor, logits: Tensor) -> Any:
        return mk.gated_mixture(experts, logits, routing)

    def plain(experts: Tensor, logits: Tensor) -> Any:
        return tuple((torch.softmax(part, 1)[..., None] * experts).sum(1) for part in logits.split(3, 1))

    with mk.use_backend(backend):
        assert_same(torch.func.vmap(fused, dims)(*batched), torch.func.vmap(plain, dims)(*batched))
        got = torch.func.vmap(torch.func.grad(loss_of(fused), (0, 1)), dims)(*batched)
    assert_same(got, torch.func.vmap(torch.func.grad(loss_of(plain), (0, 1)), dims)(*batched))


def test_per_task_jacobians_by_is_grads_batched(pair: Any, backend: str) -> None:
    """All tasks' gradients in one batched backward, as Jacobian descent wants them."""
    fused, plain, values = pair
    leaves = [v.clone().requires_grad_() for v in values]

    def jacobian(function: Callable[..., Any]) -> list[Tensor]:
        losses = torch.stack([y.square().sum() for y in function(*leaves)])
        rows = torch.eye(3, dtype=torch.float64)
        found = torch.autograd.grad(losses, leaves, rows, is_grads_batched=True, allow_unused=True)
        return [leaf.new_zeros(3, *leaf.shape) if t is None else t for t, leaf in zip(found, leaves, strict=True)]

    with mk.use_backend(backend):
        assert_same(jacobian(fused), jacobian(plain))
