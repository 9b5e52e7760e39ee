"""Norms and dropout in expert_mixture among PyTorch's habits: opcheck, derivatives, transforms, compile, autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from mtlkernels.ops import activations as act
from mtlkernels.testing import Case, CaseFactory, evaluate
from tests.conftest import cpu_backends
from tests.ops import normalized

OP = "normalized_mixture"
# Ragged gates, three streams of which nobody reads the second, and an expert that no gate mixes.
ROUTING = mk.Routing((0, 2, 0, 0), ((2, 0), (1,), (0, 1, 2)))
COMPILING = [
    pytest.mark.usefixtures("fresh_compiler"),
    # torch._dynamo makes an instance of each autograd.Function that it traces, and torch warns of that.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
]
STYLES = pytest.mark.parametrize(
    "kinds, dropout",
    [(["batch", "none"], [0.3, 0.0]), (["layer", "batch"], [0.0, 0.0]), (["none", "layer"], [0.0, 0.5])],
)


def small(kinds: Any, dropout: Any, dtype: torch.dtype = torch.float64, rows: int = 4, **options: Any) -> Case:
    options = {"activation": ["dice", "prelu"], "eps": [0.1, 0.1], **options}
    return normalized.case(CaseFactory(0, dtype), rows, [3, 3, 2], ROUTING, kinds, dropout=dropout, **options)


def function_of_leaves(op: Callable[..., Any], case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    place = {id(leaf): i for i, leaf in enumerate(leaves)}

    def call(*values: Tensor) -> Any:
        return tuple(op(**case.map(lambda leaf: values[place[id(leaf)]] if id(leaf) in place else leaf).arguments))

    return call, leaves


def assert_same(got: Any, expected: Any) -> None:
    flat_got, spec = torch.utils._pytree.tree_flatten(got)
    flat_expected, expected_spec = torch.utils._pytree.tree_flatten(expected)
    assert spec == expected_spec
    for a, b in zip(flat_got, flat_expected, strict=True):
        torch.testing.assert_close(a, b)


# The operators themselves -------------------------------------------------------------------------------------------


def operator_arguments(dtype: torch.dtype, rows: int, requires_grad: bool) -> tuple[Any, ...]:
    make = CaseFactory(0, dtype)

    def leaf(*shape: int) -> Tensor:
        return make.leaf(*shape, requires_grad=requires_grad)

    weights = [leaf(4, 3) for _ in range(3)] + [leaf(2, 4) for _ in range(3)] + [leaf(5, 2) for _ in range(3)]
    biases = [leaf(4) for _ in range(3)] + [None] * 6
    scales = [leaf(4), None, leaf(4), *(leaf(2) for _ in range(3)), None, None, None]
    shifts = [leaf(4), None, None, *(leaf(2) for _ in range(3)), None, None, None]
    logits = [leaf(rows, 2), leaf(rows, 3)]
    slopes = [None] * 3 + [leaf(1), leaf(2), leaf(1)] + [leaf(5), leaf(1), leaf(5)]
    routing = ([0, 1, 0], [2, 0, 0, 1, 2], [2, 3], [1, act.DICE, act.PRELU])
    norms = [2 if rows < 2 else 1, 2, 0]
    inputs = [leaf(rows, 3), leaf(rows, 3)]
    seed = torch.tensor([2**40 + 5])
    numbers = ([1e-5, 1e-3, 0.0], [0.0, 1e-3, 0.0], [0.0, 0.3, 0.5])
    return inputs, weights, biases, scales, shifts, slopes, logits, *routing, norms, *numbers, seed


DTYPES_ROWS = pytest.mark.parametrize(
    "kind, rows", [(torch.float32, 5), (torch.bfloat16, 4), (torch.float64, 0), (torch.float16, 1)]
)


@DTYPES_ROWS
def test_opcheck_forward(kind: torch.dtype, rows: int) -> None:
    for requires_grad in (True, False):
        arguments = operator_arguments(kind, rows, requires_grad)
        torch.library.opcheck(torch.ops.mtlkernels.normalized_mixture_forward, arguments)


@DTYPES_ROWS
def test_opcheck_backward(kind: torch.dtype, rows: int) -> None:
    arguments = operator_arguments(kind, rows, False)
    inputs, weights, _, *affine, logits = arguments[:7]
    outputs, saved, means, variances = torch.ops.mtlkernels.normalized_mixture_forward(*arguments)
    grads = [torch.randn_like(y) for y in outputs]
    tensors = (grads, inputs, weights, *affine, logits, saved, means, variances)
    for needs in ((True,) * 6, *(tuple(i == j for i in range(6)) for j in range(6))):
        torch.library.opcheck(torch.ops.mtlkernels.normalized_mixture_backward, (*tensors, *arguments[7:], *needs))


# Derivatives --------------------------------------------------------------------------------------------------------


@STYLES
@pytest.mark.parametrize("activation", ["tanh", "prelu", "dice"])
def test_first_derivatives(kinds: Any, dropout: Any, activation: str, backend: str) -> None:
    call, leaves = function_of_leaves(normalized.fused, small(kinds, dropout, activation=activation))
    with mk.use_backend(backend):
        assert gradcheck(call, leaves)


# The kernels' own are the reference's: Dice, which has the most terms, shows that they are asked for.
@STYLES
@pytest.mark.parametrize(
    ("activation", "implementation"),
    [("gelu", "reference"), ("prelu", "reference"), *(("dice", name) for name in cpu_backends(OP))],
)
def test_second_derivatives(kinds: Any, dropout: Any, activation: str, implementation: str) -> None:
    call, leaves = function_of_leaves(normalized.fused, small(kinds, dropout, activation=activation))
    with mk.use_backend(implementation):
        assert gradgradcheck(call, leaves)


@STYLES
def test_batched_gradients(kinds: Any, dropout: Any, backend: str) -> None:
    call, leaves = function_of_leaves(normalized.fused, small(kinds, dropout))
    with mk.use_backend(backend):
        outputs = call(*leaves)
        grads = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
        got = torch.autograd.grad(outputs, leaves, grads, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            each = torch.autograd.grad(outputs, leaves, [g[i] for g in grads], retain_graph=True)
            assert_same([g[i] for g in got], list(each))


@STYLES
def test_func(kinds: Any, dropout: Any, backend: str) -> None:
    case = small(kinds, dropout)
    fused, leaves = function_of_leaves(normalized.fused, case)
    plain, _ = function_of_leaves(normalized.definition, case)
    values = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(values)))

    def loss(function: Any) -> Any:
        return lambda *v: sum((y * y).sum() * (k + 1) for k, y in enumerate(function(*v)))

    def second(function: Any) -> Any:
        return torch.func.grad(lambda *v: torch.func.grad(loss(function))(*v).square().sum(), every)(*values)

    with mk.use_backend(backend):
        assert_same(torch.func.grad(loss(fused), every)(*values), torch.func.grad(loss(plain), every)(*values))
        assert_same(torch.func.jacrev(fused, 3)(*values), torch.func.jacrev(plain, 3)(*values))
        assert_same(second(fused), second(plain))


@pytest.mark.parametrize("batched", [[0], [3, 4], range(40)])
def test_vmap_is_a_call_an_example(batched: Any, backend: str) -> None:
    """Each example has its own statistics; with randomness "same" all have one mask."""
    fused, leaves = function_of_leaves(normalized.fused, small(["batch", "layer"], [0.0, 0.0]))
    examples = [
        torch.randn(3, *leaf.shape, dtype=leaf.dtype) if i in batched else leaf.detach()
        for i, leaf in enumerate(leaves)
    ]
    dims = tuple(0 if i in batched else None for i in range(len(leaves)))
    with mk.use_backend(backend):
        got = torch.func.vmap(fused, dims)(*examples)
        for i in range(3):
            each = fused(*(t if dim is None else t[i] for t, dim in zip(examples, dims, strict=True)))
            assert_same([y[i] for y in got], list(each))


def test_vmap_of_dropout_as_of_pytorchs(backend: str) -> None:
    x, weight, logits = torch.ones(3, 20, 1), torch.ones(1, 30, 1), torch.zeros(20, 1)

    def call(x: Tensor) -> Tensor:
        return mk.expert_mixture(x, [weight], None, logits, mk.Routing.mmoe(1, 1), dropout=0.5)[0]

    with mk.use_backend(backend):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(call)(x)
        same = torch.func.vmap(call, randomness="same")(x)
        different = torch.func.vmap(call, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


# Modules, compile ---------------------------------------------------------------------------------------------------


class Level(nn.Module):
    def __init__(self, kind: Any = nn.BatchNorm1d, dropout: float = 0.0) -> None:
        super().__init__()
        self.routing = mk.Routing.mmoe(2, 2)
        self.linears = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))
        self.norms = nn.ModuleList(kind(5) for _ in range(2))
        self.gate = nn.Linear(6, 4)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.linears
        weights, biases = [[m.weight for m in layers]], [[m.bias for m in layers]]
        rate = self.dropout if self.training else 0.0
        norms: Any = [list(self.norms)]
        logits = self.gate(x)
        return torch.cat(
            mk.expert_mixture(x, weights, biases, logits, self.routing, activation="silu", norms=norms, dropout=rate), 1
        )


def gradients(module: nn.Module, function: Any, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()]), *module.buffers()]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.LayerNorm, lambda n: nn.BatchNorm1d(n, momentum=None)])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
class TestCompiled:
    pytestmark = COMPILING

    def test_without_a_graph_break(self, kind: Any, compiler: str) -> None:
        module = Level(kind)
        other = copy.deepcopy(module)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
        for rows in (9, 4):
            x = torch.randn(rows, 6)
            assert_same(gradients(module, compiled, x), gradients(other, other, x))
        module.eval(), other.eval()
        with torch.no_grad():
            assert_same(compiled(x), other(x))


class TestCompiledOthers:
    pytestmark = COMPILING

    def test_dropout_is_drawn_anew_and_the_same_in_the_backward_pass(self) -> None:
        x, weight, logits = torch.ones(20, 1), torch.ones(1, 30, 1, requires_grad=True), torch.zeros(20, 1)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def call(weight: Tensor) -> Tensor:
            return mk.expert_mixture(x, [weight], None, logits, mk.Routing.mmoe(1, 1), dropout=0.5)[0]

        first, second = call(weight), call(weight)
        assert not torch.equal(first, second)
        (grad,) = torch.autograd.grad(first.sum(), weight)
        torch.testing.assert_close(grad[0, :, 0], first.detach().sum(0))

    def test_func_inside_compile(self) -> None:
        module = Level()
        parameters = dict(module.named_parameters())
        x = torch.randn(7, 6)

        def loss(parameters: Any, x: Tensor) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            y: Tensor = torch.func.functional_call(module, {**parameters, **buffers}, (x,))
            return y.square().sum()

        compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
        assert_same(compiled(parameters, x), torch.func.grad(loss)(parameters, x))


def test_func_grad_of_a_module_with_buffers(backend: str) -> None:
    module = Level()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(7, 6)

    def loss(parameters: Any) -> Tensor:
        y: Tensor = torch.func.functional_call(module, parameters, (x,))
        return y.square().sum()

    with mk.use_backend(backend):
        got = torch.func.grad(loss)(parameters)
        expected = gradients(module, module, x)
    assert_same(list(got.values()), expected[2:-6])
    assert int(module.norms[0].num_batches_tracked) == 2  # type: ignore[arg-type]


# Habits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low: torch.dtype, backend: str) -> None:
    """As by hand: inputs, weights and biases in the low dtype, other parameters in float32."""
    case = small(["batch", "layer"], [0.2, 0.0], torch.float32, 20)

    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast("cpu", low):
            return normalized.fused(**arguments)

    def by_hand(**arguments: Any) -> Any:
        cast = Case(arguments, low).map(lambda t: t.to(low)).arguments
        kept = {name: arguments[name] for name in ("gate_logits", "scales", "shifts", "slopes")}
        return normalized.fused(**{**cast, **kept})

    with mk.use_backend(backend):
        got, expected = evaluate(under_autocast, case), evaluate(by_hand, case)
    assert {y.dtype for y in got["outputs"]} == {low}
    for name, group in expected.items():
        if name != "outputs":
            assert {grad.dtype for grad in got[name]} == {torch.float32}
        for a, b in zip(got[name], group, strict=True):
            torch.testing.assert_close(a, b)


def test_kept_graph_and_changed_arguments(backend: str) -> None:
    case = small(["batch", "layer"], [0.2, 0.0])
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    with mk.use_backend(backend):
        loss = sum(y.square().sum() for y in normalized.fused(**case.arguments))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_same(list(torch.autograd.grad(loss, leaves, retain_graph=True)), list(first))
        with torch.no_grad():
            case.arguments["scales"][0][0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_activation_checkpointing(backend: str) -> None:
    """The recomputation draws the same seed, as PyTorch keeps the state of its generators."""
    case = small(["batch", "layer"], [0.2, 0.1])

    def checkpointed(**arguments: Any) -> Any:
        return checkpoint(lambda: normalized.fused(**arguments), use_reentrant=False)

    with mk.use_backend(backend):
        got, expected = evaluate(checkpointed, case), evaluate(normalized.fused, case)
    for name, group in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(got[name], group, strict=True))


def test_some_outputs_unused(backend: str) -> None:
    case = small(["batch", "layer"], [0.2, 0.1])
    with mk.use_backend(backend):
        outputs = normalized.fused(**case.arguments)
        got = torch.autograd.grad(outputs[1].square().sum(), case.arguments["gate_logits"], allow_unused=True)
    assert [grad is None for grad in got] == [True, False, True]
    assert not got[1].any()  # the softmax of one expert's logit is 1
    with mk.use_backend(backend):
        outputs = normalized.fused(**case.arguments)
        got = torch.autograd.grad(outputs[0].square().sum(), case.arguments["gate_logits"], allow_unused=True)
    assert [grad is None for grad in got] == [False, True, True]
    assert got[0].any()


def test_on_the_meta_device() -> None:
    case = normalized.case(CaseFactory(0, torch.float32, device="meta"), 6, [4, 3], ROUTING, ["batch"], dropout=[0.5])
    assert [tuple(y.shape) for y in normalized.fused(**case.arguments)] == [(6, 3)] * 3


@pytest.mark.parametrize("training", [True, False])
def test_copies_of_a_model(training: bool) -> None:
    model, x = Level().train(training), torch.randn(7, 6)
    model(x)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    again(x).sum().backward()
    assert model.linears[0].weight.grad is None and again.linears[0].weight.grad is not None
