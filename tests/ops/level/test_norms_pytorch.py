"""Norms and dropout in expert_mixture among PyTorch's habits: derivatives, transforms, compile, autocast."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory, evaluate
from tests.conftest import cpu_backends
from tests.ops.derivatives import function_of_leaves, leaves_of, loss_of
from tests.ops.level import normalized
from tests.ops.level.definition import formula

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


# Derivatives --------------------------------------------------------------------------------------------------------


@STYLES
@pytest.mark.parametrize("activation", ["tanh", "prelu", "dice"])
def test_first_derivatives(kinds: Any, dropout: Any, activation: str, backend: str) -> None:
    call, leaves = function_of_leaves(normalized.fused, small(kinds, dropout, activation=activation))
    with mk.use_backend(backend):
        assert gradcheck(call, leaves)


# The kernels' own are the reference's: Dice, which has the most terms, shows that they are asked for. By random
# projections, as hundreds of elements one by one take half a minute.
@STYLES
@pytest.mark.parametrize("implementation", cpu_backends("expert_mixture"))
def test_second_derivatives_of_dice(kinds: Any, dropout: Any, implementation: str) -> None:
    check_second_derivatives(kinds, dropout, "dice", implementation)


@pytest.mark.parametrize("activation", ["gelu", "prelu"])
def test_second_derivatives(activation: str) -> None:
    check_second_derivatives(["layer", "batch"], [0.3, 0.0], activation, "reference")


def check_second_derivatives(kinds: Any, dropout: Any, activation: str, implementation: str) -> None:
    call, leaves = function_of_leaves(normalized.fused, small(kinds, dropout, activation=activation))
    with mk.use_backend(implementation):
        assert gradgradcheck(call, leaves, fast_mode=True)


@STYLES
def test_batched_gradients(kinds: Any, dropout: Any, backend: str) -> None:
    call, leaves = function_of_leaves(normalized.fused, small(kinds, dropout))
    with mk.use_backend(backend):
        outputs = call(*leaves)
        grads = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
        got = torch.autograd.grad(outputs, leaves, grads, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            each = torch.autograd.grad(outputs, leaves, [g[i] for g in grads], retain_graph=True)
            assert_close([g[i] for g in got], list(each))


@STYLES
def test_func(kinds: Any, dropout: Any, backend: str) -> None:
    case = small(kinds, dropout)
    fused, leaves = function_of_leaves(normalized.fused, case)
    plain, _ = function_of_leaves(formula, case)
    values = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(values)))

    def second(function: Any) -> Any:
        return torch.func.grad(lambda *v: torch.func.grad(loss_of(function))(*v).square().sum(), every)(*values)

    with mk.use_backend(backend):
        assert_close(torch.func.grad(loss_of(fused), every)(*values), torch.func.grad(loss_of(plain), every)(*values))
        assert_close(torch.func.jacrev(fused, 3)(*values), torch.func.jacrev(plain, 3)(*values))
        assert_close(second(fused), second(plain))


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
            assert_close([y[i] for y in got], list(each))


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


@pytest.mark.parametrize(
    "kind, compiler",
    [
        (nn.BatchNorm1d, "inductor"),
        (nn.LayerNorm, "aot_eager"),
        (nn.LayerNorm, "inductor"),
        (lambda n: nn.BatchNorm1d(n, momentum=None), "aot_eager"),
    ],
)
class TestCompiled:
    pytestmark = COMPILING

    def test_without_a_graph_break(self, kind: Any, compiler: str) -> None:
        module = Level(kind)
        other = copy.deepcopy(module)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
        for rows in (9, 4):
            x = torch.randn(rows, 6)
            assert_close(gradients(module, compiled, x), gradients(other, other, x))
        module.eval(), other.eval()
        with torch.no_grad():
            assert_close(compiled(x), other(x))


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
        assert_close(grad[0, :, 0], first.detach().sum(0))

    def test_func_inside_compile(self) -> None:
        module = Level()
        parameters = dict(module.named_parameters())
        x = torch.randn(7, 6)

        def loss(parameters: Any, x: Tensor) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            y: Tensor = torch.func.functional_call(module, {**parameters, **buffers}, (x,))
            return y.square().sum()

        compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
        assert_close(compiled(parameters, x), torch.func.grad(loss)(parameters, x))


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
    assert_close(list(got.values()), expected[2:-6])
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
        assert_close(got[name], group)


def test_kept_graph_and_changed_arguments(backend: str) -> None:
    case = small(["batch", "layer"], [0.2, 0.0])
    leaves = leaves_of(case)
    with mk.use_backend(backend):
        loss = sum(y.square().sum() for y in normalized.fused(**case.arguments))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_close(list(torch.autograd.grad(loss, leaves, retain_graph=True)), list(first))
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
    assert_close(got, expected, rtol=0, atol=0)


def _keeps_nothing(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_a_checkpoint_that_ends_with_a_level_counts_as_with_modules(backend: str, cast: bool, selective: bool) -> None:
    """The recomputation stops as soon as the last tensor is there that it was made for."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _keeps_nothing)
    fused = mk.nn.MMoE(6, 2, (5,), 3, batch_norm=True)
    own = copy.deepcopy(fused)
    for expert in own.level.experts:
        expert.register_forward_hook(lambda *args: None)  # so that modules are called
    x = torch.randn(7, 6)
    for trunk in (fused, own):
        with mk.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            options: Any = {"context_fn": contexts} if selective else {}
            outputs = checkpoint(trunk, x, use_reentrant=False, **options)
            sum(y.sum() for y in outputs).backward()
    buffers, expected = dict(fused.named_buffers()), dict(own.named_buffers())
    assert {int(value) for name, value in expected.items() if name.endswith("num_batches_tracked")} == {2}
    assert_close(buffers, expected, rtol=2e-2 if cast else 1e-5, atol=1e-2 if cast else 1e-5)


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
