"""snr_trans and snr_aver in PyTorch: derivatives of every order, torch.func, compile, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory, evaluate
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops.derivatives import function_of_leaves, leaves_of, loss_of
from tests.ops.snr_aver.definition import formula as aver_formula
from tests.ops.snr_trans.definition import formula as trans_formula

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]


def trans(dtype: torch.dtype = torch.float64, rows: int = 3, stacked: bool = False, **options: Any) -> Case:
    """Three routes of six are open; ragged unless stacked."""
    widths = ([2, 2], [3, 3, 3]) if stacked else ([2, 4], [3, 1, 2])
    case = snr_trans(CaseFactory(0, dtype), rows, *widths, share=1.0, stacked=stacked, **options)
    return _half_closed(case)


def aver(dtype: torch.dtype = torch.float64, rows: int = 3, **options: Any) -> Case:
    return _half_closed(snr_aver(CaseFactory(0, dtype), rows, 3, 2, 3, share=1.0, **options))


def _half_closed(case: Case) -> Case:
    with torch.no_grad():
        case.arguments["z"].copy_(torch.tensor([[0.7, 0.0], [0.0, 1.0], [0.4, 0.0]]))
    return case


FORMULAS = {mk.snr_trans: trans_formula, mk.snr_aver: aver_formula}
OPS = pytest.mark.parametrize(
    "op, make",
    [(mk.snr_trans, trans), (mk.snr_trans, lambda *a, **k: trans(*a, stacked=True, **k)), (mk.snr_aver, aver)],
    ids=["trans", "stacked trans", "aver"],
)


def operator_arguments(op: Any, case: Case) -> tuple[Any, ...]:
    values = case.arguments
    if op is mk.snr_aver:
        return values["u"], values["z"]
    weight = values["weight"]
    return values["u"], [weight] if isinstance(weight, Tensor) else [w for row in weight for w in row], values["z"]


# opcheck and finite differences -------------------------------------------------------------------------------------


@OPS
@pytest.mark.parametrize("dtype_name, rows", [("float32", 5), ("bfloat16", 0), ("float16", 3)])
def test_opcheck(op: Any, make: Any, dtype_name: str, rows: int) -> None:
    arguments = operator_arguments(op, make(getattr(torch, dtype_name), rows))
    torch.library.opcheck(getattr(torch.ops.mtlkernels, f"{op.__name__}_forward"), arguments)
    plain = [[t.detach() for t in group] if isinstance(group, list) else group.detach() for group in arguments]
    grads = [torch.randn_like(v) for v in getattr(torch.ops.mtlkernels, f"{op.__name__}_forward")(*plain)]
    backward = getattr(torch.ops.mtlkernels, f"{op.__name__}_backward")
    kinds = len(arguments)
    for needs in ((True,) * kinds, *(tuple(n == k for n in range(kinds)) for k in range(kinds))):
        torch.library.opcheck(backward, (grads, *plain, *needs, needs[0]))


@OPS
def test_finite_differences(op: Any, make: Any, backend: str) -> None:
    with mk.use_backend(backend):
        function, leaves = function_of_leaves(op, make())
        gradcheck(function, leaves, check_batched_grad=True)
        gradgradcheck(function, leaves)


@OPS
def test_finite_differences_without_those_of_closed_routes(op: Any, make: Any, backend: str) -> None:
    """Where z comes out of a clamp, closed_grad changes no derivative of any order."""
    case = make()
    z = case.arguments["z"].detach()
    raw = torch.where(z == 0, -0.2, z).requires_grad_()
    case = Case({**case.arguments, "z": raw, "closed_grad": False}, case.dtype)
    function, leaves = function_of_leaves(lambda z, **rest: op(z=z.clamp(0, 0.9), **rest), case)
    with mk.use_backend(backend):
        gradcheck(function, leaves)
        gradgradcheck(function, leaves)


@OPS
def test_closed_routes_have_no_part_in_second_derivatives(op: Any, make: Any, backend: str) -> None:
    """Those of z where it is a leaf: as if z's zeros were constants."""
    case = make()
    rows, columns = case.arguments["z"].shape
    z = torch.arange(rows * columns, dtype=torch.float64).remainder(3).div(2).view(rows, columns).requires_grad_()
    rest = {name: value for name, value in case.arguments.items() if name != "z"}

    def second(function: Callable[..., Any], gates: Tensor, **options: bool) -> list[Tensor]:
        outputs = function(**rest, z=gates, **options)
        leaves = list(rest["u"])
        first = torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves, create_graph=True)
        loss = sum(grad.square().sum() + grad.sum() for grad in first)
        return list(torch.autograd.grad(loss, [z, *leaves]))

    with mk.use_backend(backend):
        actual = second(op, z, closed_grad=False)
    expected = second(FORMULAS[op], torch.where(z != 0, z, z.detach()))
    assert (z == 0).any() and not actual[0][z == 0].any() and actual[0].any()
    for found, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, right)


# torch.func ---------------------------------------------------------------------------------------------------------


def pair(op: Any, make: Any) -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:
    case = make(rows=4)
    fused, leaves = function_of_leaves(op, case)
    plain, _ = function_of_leaves(FORMULAS[op], case)
    return fused, plain, [leaf.detach() for leaf in leaves]


@OPS
def test_func_grad_and_jacrev_and_nested(op: Any, make: Any, backend: str) -> None:
    fused, plain, values = pair(op, make)
    every = tuple(range(len(values)))

    def second(function: Callable[..., Any]) -> Any:
        inner = torch.func.grad(loss_of(function))
        return torch.func.grad(lambda *v: inner(*v).square().sum(), every)(*values)

    with mk.use_backend(backend):
        assert_close(torch.func.grad(loss_of(fused), every)(*values), torch.func.grad(loss_of(plain), every)(*values))
        assert_close(torch.func.jacrev(fused, every)(*values), torch.func.jacrev(plain, every)(*values))
        assert_close(second(fused), second(plain))
        assert_close(
            torch.func.jacrev(torch.func.jacrev(loss_of(fused)))(*values),
            torch.func.jacrev(torch.func.jacrev(loss_of(plain)))(*values),
        )


@OPS
@pytest.mark.parametrize("which", ["u", "z", "first", "every"])
def test_vmap(op: Any, make: Any, which: str, backend: str) -> None:
    fused, plain, values = pair(op, make)
    count = len(values)
    chosen = {"u": range(2), "z": [count - 1], "first": [0], "every": range(count)}[which]
    every = tuple(range(count))
    for dim in (0, -1):
        in_dims = tuple(dim if i in chosen else None for i in every)
        batched = [v if d is None else torch.stack([v, v * 2, v + 1], d) for v, d in zip(values, in_dims, strict=True)]
        with mk.use_backend(backend):
            assert_close(torch.func.vmap(fused, in_dims)(*batched), torch.func.vmap(plain, in_dims)(*batched))
            got = torch.func.vmap(torch.func.grad(loss_of(fused), every), in_dims)(*batched)
        assert_close(got, torch.func.vmap(torch.func.grad(loss_of(plain), every), in_dims)(*batched))


@OPS
def test_per_task_jacobians_by_is_grads_batched(op: Any, make: Any, backend: str) -> None:
    fused, plain, values = pair(op, make)
    leaves = [v.clone().requires_grad_() for v in values]

    def jacobian(function: Callable[..., Any]) -> Any:
        losses = torch.stack([v.square().sum() for v in function(*leaves)])
        return torch.autograd.grad(losses, leaves, torch.eye(3, dtype=torch.float64), is_grads_batched=True)

    with mk.use_backend(backend):
        assert_close(jacobian(fused), jacobian(plain))


# torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@OPS
def test_compile_with_a_dynamic_batch(op: Any, make: Any) -> None:
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    evaluate(compiled, make(torch.float32, 9))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 33, 150):
            case = make(torch.float32, rows)
            expected = evaluate(op, case)
            assert_close(evaluate(compiled, case), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_the_reference_and_of_vmap() -> None:
    u, w, z = torch.randn(2, 5, 4), torch.randn(3, 2, 6, 4), torch.tensor([[1.0, 0.0], [0.0, 0.3], [0.5, 2.0]])

    def loss(u: Tensor, z: Tensor) -> Tensor:
        return sum(v.square().sum() for v in mk.snr_trans(u, w, z))

    with mk.use_backend("reference"):
        leaves = u.clone().requires_grad_(), z.clone().requires_grad_()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_close(torch.autograd.grad(compiled(*leaves), leaves), torch.func.grad(loss, (0, 1))(u, z))
    torch.compiler.reset()
    batched = torch.func.vmap(loss, (0, None))
    many = torch.stack([u, 2 * u])
    compiled = torch.compile(batched, fullgraph=True, backend="aot_eager")
    assert_close(compiled(many, z), batched(many, z))


# Autocast and modes -------------------------------------------------------------------------------------------------


@OPS
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(op: Any, make: Any, low: torch.dtype, backend: str) -> None:
    """Outputs in the low dtype, gradients in the parameters' own; the values are those of a cast by hand."""
    case = make(torch.float32, 7)

    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast("cpu", low):
            return op(**arguments)

    def by_hand(**arguments: Any) -> Any:
        cast = Case(arguments, low).map(lambda t: t.to(low)).arguments
        return op(**{**cast, "z": arguments["z"]})

    with mk.use_backend(backend):
        got, expected = evaluate(under_autocast, case), evaluate(by_hand, case)
    assert {v.dtype for v in got["outputs"]} == {low}
    for name, group in expected.items():
        assert name == "outputs" or {grad.dtype for grad in got[name]} == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(got[name], group, strict=True))


@OPS
def test_autocast_of_the_operator_itself(op: Any, make: Any) -> None:
    arguments = operator_arguments(op, make(torch.float32, 7))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = getattr(torch.ops.mtlkernels, f"{op.__name__}_forward")(*arguments)
    assert {v.dtype for v in outputs} == {torch.bfloat16} and outputs[0].requires_grad


@OPS
def test_inference_mode_and_meta_tensors(op: Any, make: Any, backend: str) -> None:
    case = make(torch.float32, 7)
    with mk.use_backend(backend), torch.inference_mode():
        serving = op(**case.arguments)
        assert all(v.is_inference() for v in serving)
    with mk.use_backend(backend):
        assert_close(serving, tuple(v.detach() for v in op(**case.arguments)))
    abstract = op(**case.map(lambda t: t.detach().to("meta")).arguments)
    assert [tuple(v.shape) for v in abstract] == [tuple(v.shape) for v in serving]


@OPS
def test_hooks_on_saved_tensors_and_second_backward(op: Any, make: Any) -> None:
    case = make(torch.float32, 7)
    leaves = leaves_of(case)
    with torch.autograd.graph.save_on_cpu():
        loss = sum(v.square().sum() for v in op(**case.arguments))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_close(torch.autograd.grad(loss, leaves), first)


def test_one_tensor_in_several_places(backend: str) -> None:
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    z = torch.tensor([[0.5, 1.0], [0.0, 2.0]])
    with mk.use_backend(backend):
        grads = torch.autograd.grad(sum(v.sum() for v in mk.snr_trans([x, x], [[w, w], [w, w]], z)), (x, w))
    expected = torch.autograd.grad((3.5 * x @ w.t()).sum(), (x, w))
    assert_close(grads, expected)
