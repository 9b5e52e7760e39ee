"""Derivatives of a level, of every order, against finite differences, and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import mtlkernels as mk
from mtlkernels.ops.activations import ACTIVATIONS
from mtlkernels.testing import Case, CaseFactory
from tests.ops.derivatives import function_of_leaves, leaves_of, loss_of
from tests.ops.level.definition import linear_gates
from tests.ops.level.gate_layers import by_layers, with_layers

# Ragged gates, three streams of which nobody reads the second, and an expert that no gate mixes.
ROUTING = mk.Routing((0, 2, 0, 0), ((2, 0), (1,), (0, 1, 2)))


def expert(dtype: torch.dtype = torch.float64, rows: int = 3, activation: Any = "tanh", **options: Any) -> Case:
    return CaseFactory(0, dtype).expert_mixture(rows, [3, 2, 2], ROUTING, activation=activation, **options)


# Finite differences -------------------------------------------------------------------------------------------------


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
            assert_close(derivative(fused), derivative(plain))


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
    leaves = leaves_of(case)
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


def by_eager_layers(*, gate_weights: Any, gate_biases: Any, **arguments: Any) -> tuple[Tensor, ...]:
    """The same where gates are linear layers."""
    logits = linear_gates(arguments["inputs"], gate_weights, gate_biases, arguments["routing"])
    return by_eager(gate_logits=logits, **arguments)


def layers() -> Case:
    return with_layers(CaseFactory(0, torch.float64), 3, [3, 2], activation="tanh")


@pytest.mark.parametrize("wanted", ["inputs", "weights[0]", "biases[0]", "gate_weights", "gate_biases"])
def test_gradients_with_derivatives_of_one_kind_of_tensors(wanted: str, backend: str) -> None:
    """All others are frozen, and each kind has to be enough for its own gradient to be made."""
    found = []
    with mk.use_backend(backend):
        for op in (by_layers, by_eager_layers):
            case = layers()
            leaves = case.leaves()[wanted]
            for leaf in leaves_of(case):
                leaf.requires_grad_(any(leaf is own for own in leaves))
            total = torch.stack([y.square().sum() for y in op(**case.arguments)])
            found.append(torch.autograd.grad(total.sum(), leaves, create_graph=True))
    assert_close(*found)


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


@pytest.fixture(name="losses", params=["logits", "linear gates"])
def _losses(request: pytest.FixtureRequest, pair: Any) -> Pair:
    """A vector of losses as a function of the leaves, of which the first are three inputs."""
    fused, plain, values = pair
    if request.param == "linear gates":
        case = layers()
        (fused, leaves), (plain, _) = (function_of_leaves(op, case) for op in (by_layers, by_eager_layers))
        values = [leaf.detach() for leaf in leaves]

    def of(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *v: torch.stack([y.square().sum() for y in function(*v)])

    return of(fused), of(plain), values


def test_jacobians_of_examples(losses: Pair, backend: str) -> None:
    """Gradients that are batched twice, by losses and by examples."""
    fused, plain, values = losses
    dims = (0,) * 3 + (None,) * (len(values) - 3)
    examples = [torch.stack([v, 2 * v, -v]) if dim == 0 else v for v, dim in zip(values, dims, strict=True)]
    with mk.use_backend(backend):
        found = torch.func.vmap(torch.func.jacrev(fused, (0, 1, 2)), dims)(*examples)
    assert_close(found, torch.func.vmap(torch.func.jacrev(plain, (0, 1, 2)), dims)(*examples))


def test_derivatives_of_a_jacobian(losses: Pair, backend: str) -> None:
    """All losses' gradients come from one call, and so their derivatives add up."""
    fused, plain, values = losses

    def derivatives(function: Callable[..., Tensor]) -> Any:
        jacobian = torch.func.jacrev(function)
        return torch.func.grad(lambda *v: jacobian(*v).pow(3).sum(), tuple(range(len(values))))(*values)

    with mk.use_backend(backend):
        assert_close(derivatives(fused), derivatives(plain))


def test_derivatives_of_third_order_within_hooks_on_saved_tensors(pair: Any, backend: str) -> None:
    """They are made by transforms of torch.func, which PyTorch refuses within such hooks."""
    fused, plain, values = pair

    def derivatives(function: Callable[..., Any]) -> Any:
        leaves = [value.clone().requires_grad_() for value in values]
        loss = loss_of(function)(*leaves)
        for _ in range(2):
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            loss = loss + sum(grad.square().sum() for grad in grads if grad is not None)
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    with mk.use_backend(backend), torch.autograd.graph.save_on_cpu():
        got = derivatives(fused)
    assert_close(got, derivatives(plain))


def test_func_grad_and_vjp_and_jacrev(pair: Any, backend: str) -> None:
    fused, plain, values = pair
    every = tuple(range(len(values)))
    with mk.use_backend(backend):
        assert_close(torch.func.grad(loss_of(fused), every)(*values), torch.func.grad(loss_of(plain), every)(*values))
        assert_close(torch.func.jacrev(fused, every)(*values), torch.func.jacrev(plain, every)(*values))


def test_func_nested_grad(pair: Any, backend: str) -> None:
    fused, plain, values = pair

    def second(function: Callable[..., Any]) -> Any:
        inner = torch.func.grad(loss_of(function))
        return torch.func.grad(lambda *v: inner(*v).square().sum(), tuple(range(len(values))))(*values)

    with mk.use_backend(backend):
        assert_close(second(fused), second(plain))


def test_func_hessian_by_jacrev_twice(pair: Any, backend: str) -> None:
    fused, plain, values = pair
    with mk.use_backend(backend):
        got = torch.func.jacrev(torch.func.jacrev(loss_of(fused)))(*values)
    assert_close(got, torch.func.jacrev(torch.func.jacrev(loss_of(plain)))(*values))


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
        assert_close(torch.func.vmap(fused, in_dims)(*batched), torch.func.vmap(plain, in_dims)(*batched))
        got = torch.func.vmap(torch.func.grad(loss_of(fused), every), in_dims)(*batched)
    assert_close(got, torch.func.vmap(torch.func.grad(loss_of(plain), every), in_dims)(*batched))


def test_vmap_of_vmap(pair: Any, backend: str) -> None:
    fused, plain, values = pair
    in_dims = [tuple(0 if i in which else None for i in range(len(values))) for which in (range(0, 3), range(3, 11))]
    batched = [torch.stack([v, 2 * v]) if i < 11 else v for i, v in enumerate(values)]
    with mk.use_backend(backend):
        got = torch.func.vmap(torch.func.vmap(fused, in_dims[0]), in_dims[1])(*batched)
    assert_close(got, torch.func.vmap(torch.func.vmap(plain, in_dims[0]), in_dims[1])(*batched))


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
        assert_close(jacobian(fused), jacobian(plain))


def test_a_stream_that_nobody_reads_has_a_gradient_of_zeros() -> None:
    """Also where every expert is mixed, so that nothing else keeps a call from the direct way."""
    streams = [torch.randn(4, 3).requires_grad_() for _ in range(3)]
    routing = mk.Routing((0, 2), ((0, 1),))
    (y,) = mk.expert_mixture(streams, [torch.randn(2, 5, 3)], None, [torch.randn(4, 2)], routing)
    grads = torch.autograd.grad(y.sum(), streams)
    assert grads[0].any() and not grads[1].any()
