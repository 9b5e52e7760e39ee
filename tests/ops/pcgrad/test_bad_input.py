"""Every mistake in PCGrad's arguments gets an error that names the argument, what was expected and what was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mtlkernels as mk
from mtlkernels import _backends
from mtlkernels.ops.pcgrad import reference
from tests import requires

A, B = torch.ones(3), torch.ones(2, 2)
GRADS = [[A, B], [-A, B]]
LONG = torch.int64
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch says that the layout is in beta
    CSR = B.to_sparse_csr()
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2, 1), 1.0, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([A, A])

BAD_GRADS: list[tuple[str, Any, type[Exception], str]] = [
    ("a kind", 3.0, TypeError, r"grads must be a matrix \[T, P\] or a sequence over T tasks, got float"),
    ("a vector", A, ValueError, r"grads must be a matrix \[T, P\] or a sequence .*, got \[3\]"),
    ("a sparse matrix", B.to_sparse(), TypeError, r"grads must be a dense matrix .* got layout torch.sparse_coo"),
    ("no tasks", [], ValueError, r"grads must hold .* at least one task, got none"),
    ("no rows", torch.zeros(0, 3), ValueError, r"grads must hold .* at least one task, got none"),
    ("a flat list", [A, A], TypeError, r"grads\[0\] must be a sequence over parameters, got Tensor"),
    ("ragged", [[A, B], [A]], ValueError, r"grads\[1\] must hold 2 parameters as grads\[0\] does, got 1"),
    ("an entry's kind", [[A, B], [A, 1.0]], TypeError, r"grads\[1\]\[1\] must be a tensor or None, got float"),
    ("integers", [[A], [A.to(LONG)]], TypeError, r"grads\[1\]\[0\] must be float32, .* got torch.int64"),
    ("an integer matrix", torch.ones(2, 3, dtype=LONG), TypeError, r"grads\[0\]\[0\] must be float32, .* got"),
    ("a layout", [[CSR]], TypeError, r"grads\[0\]\[0\] must be dense or sparse_coo, .*sparse_csr"),
    ("a shape", [[A, B], [A, A]], ValueError, r"grads\[1\]\[1\] must have shape \[2, 2\] as other tasks .* \[3\]"),
    ("a dtype", [[A], [A.double()]], TypeError, r"grads\[1\]\[0\] must have dtype torch.float32 .* torch.float64"),
    ("a nested gradient", [[A, B], [A, NESTED]], TypeError, r"grads\[1\]\[1\] must be dense or .*, got a nested one"),
    ("nested gradients", [[NESTED], [NESTED]], TypeError, r"grads\[0\]\[0\] must be dense or .*, got a nested one"),
    ("a nested matrix", NESTED, TypeError, r"grads must be a dense matrix .*, got a nested one"),
    ("a device", [[A], [A.to("meta")]], ValueError, r"grads\[1\]\[0\] must be on cpu as the first .* got meta"),
]

BAD_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("reduction", "max", ValueError, r"reduction must be 'sum' or 'mean', got 'max'"),
    ("reduction", None, TypeError, r"reduction must be 'sum' or 'mean', got NoneType"),
    ("include_self", 1, TypeError, r"include_self must be True or False, got int"),
    ("normalize", "yes", TypeError, r"normalize must be True or False, got str"),
    ("project", None, TypeError, r"project must be True or False, got NoneType"),
    ("max_norm", "1", TypeError, r"max_norm must be a number, got str"),
    ("max_norm", True, TypeError, r"max_norm must be a number, got bool"),
    ("max_norm", 0.0, ValueError, r"max_norm must be positive and finite, got 0.0"),
    ("max_norm", float("nan"), ValueError, r"max_norm must be positive and finite, got nan"),
    ("eps", None, TypeError, r"eps must be a number, got NoneType"),
    ("eps", -1.0, ValueError, r"eps must be at least 0 and finite, got -1.0"),
    ("eps", float("inf"), ValueError, r"eps must be at least 0 and finite, got inf"),
    ("generator", 7, TypeError, r"generator must be a torch.Generator or None, got int"),
    ("order", 7, TypeError, r"order must be a tensor of integers or nested lists of them, got int"),
    ("order", torch.zeros(2, 1), TypeError, r"order must hold integers, got torch.float32"),
    ("order", torch.zeros(2, 1, dtype=torch.bool), TypeError, r"order must hold integers, got torch.bool"),
    ("order", torch.zeros(2, dtype=LONG), ValueError, r"order must have shape \[2, 1\] or \[2, 2\], got \[2\]"),
    ("order", torch.zeros(3, 2, dtype=LONG), ValueError, r"order must have shape .*, got \[3, 2\]"),
    ("order", [[1], [2]], ValueError, r"order\[1\] must hold tasks in \[0, 2\), got \[2\]"),
    ("order", [[-1], [0]], ValueError, r"order\[0\] must hold tasks in \[0, 2\), got \[-1\]"),
    ("order", [[0, 1], [1, 1]], ValueError, r"order\[1\] must hold each task at most once, got \[1, 1\]"),
    ("order", [[1, 0], [0]], ValueError, r"order must have rows of one length, got \[2, 1\]"),
    ("order", [["1"], [0]], TypeError, r"order\[0\] must hold integers, got str"),
    ("order", ["1", "0"], TypeError, r"order\[0\] must be a list of integers, got str"),
    ("order", [[1], [None]], TypeError, r"order\[1\] must hold integers, got NoneType"),
    ("order", [[1], None], TypeError, r"order\[1\] must be a list of integers, got NoneType"),
    ("order", [[2**70], [0]], ValueError, r"order\[0\] must hold tasks in \[0, 2\), got \[1180591620717411303424\]"),
    (
        "order",
        torch.ones(2, 1, dtype=LONG, device="meta"),
        ValueError,
        "order must have entries, as on cpu, got one on meta",
    ),
    ("order", torch.ones(2, 1, dtype=LONG).to_sparse(), TypeError, "order must be a dense tensor, got layout"),
    ("order", QUANTIZED, TypeError, r"order must hold integers, got torch.qint8"),
    ("order", NESTED, TypeError, "order must be a dense tensor, got a nested one"),
]

BAD_GRAMS: list[tuple[Any, type[Exception], str]] = [
    ([[1.0]], TypeError, r"gram must be a tensor \[T, T\], got list"),
    (torch.eye(2), TypeError, r"gram must be float64, got torch.float32"),
    (torch.zeros(2, 3, dtype=torch.float64), ValueError, r"gram must have shape \[T, T\] .*, got \[2, 3\]"),
    (torch.zeros(0, 0, dtype=torch.float64), ValueError, r"gram must have shape \[T, T\] .*, got \[0, 0\]"),
    (torch.eye(2).double().to_sparse(), TypeError, "gram must be a dense tensor, got layout torch.sparse_coo"),
    (NESTED.double(), TypeError, "gram must be a dense tensor, got a nested one"),
]


@pytest.mark.parametrize("_, grads, error, message", BAD_GRADS, ids=[name for name, *_ in BAD_GRADS])
@pytest.mark.parametrize("function", [mk.gram, mk.pcgrad])
def test_grads(function: Any, _: str, grads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(grads)


@pytest.mark.parametrize("function", [mk.gram, mk.pcgrad])
def test_where_a_nested_one_is(function: Any) -> None:
    """The task comes first, then the parameter."""
    with pytest.raises(TypeError, match=r"grads\[1\]\[2\] must be dense or sparse_coo, got a nested one"):
        function([[A, B, A], [A, B, NESTED]])


@pytest.mark.parametrize("name, value, error, message", BAD_OPTIONS)
def test_options(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.pcgrad(GRADS, **{name: value})
    if name != "reduction":
        with pytest.raises(error, match=message):
            mk.pcgrad_weights(mk.gram(GRADS), **{name: value})


@pytest.mark.parametrize("gram, error, message", BAD_GRAMS)
def test_gram(gram: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.pcgrad_weights(gram)


def test_order_and_generator_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="generator must be None where order is given, got both"):
        mk.pcgrad(GRADS, order=[[1], [0]], generator=torch.Generator())


@requires.cpp_kernels
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ops: ops.pcgrad_gram([A, A, A], 2), r"num_tasks = 2 entries a parameter, got 3"),
        (lambda ops: ops.pcgrad_gram([A, B], 2), r"grads\[1\]\[0\] must have shape \[3\], got \[2, 2\]"),
        (lambda ops: ops.pcgrad_combine([None, None], 2, torch.ones(2).double()), r"a gradient for each parameter"),
        (lambda ops: ops.pcgrad_combine([A, A], 2, torch.ones(3).double()), r"coefficients must have shape \[2\]"),
        (
            lambda ops: ops.pcgrad_weights(torch.ones(2, 3).double(), None, False, None, False, True, 0.0, False),
            r"gram must be a matrix",
        ),
    ],
)
def test_operators_called_directly(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ops.mtlkernels)


@pytest.mark.parametrize("fake", [False, True])
def test_operators_without_any_gradient(fake: bool) -> None:
    """Nothing says then which implementation to take: the reference runs, or behind a tracer the fake kernel."""
    with FakeTensorMode() if fake else nullcontext():
        for grads, tasks in ([], 3), ([None, None], 2):
            with pytest.raises(ValueError, match="grads must hold at least one gradient, .* got none"):
                torch.ops.mtlkernels.pcgrad_gram(grads, tasks)
        ones = torch.ones(2, dtype=torch.float64)
        for combine in (torch.ops.mtlkernels.pcgrad_combine, reference.combine):
            with pytest.raises(ValueError, match="grads must hold a gradient for each parameter, got none for 1"):
                combine([ones, ones, None, None], 2, ones)


def wanted(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64, requires_grad=True)


DIFFERENTIATED: dict[str, Callable[[], Any]] = {
    "gram": lambda: mk.gram([[wanted(3)], [torch.ones(3, dtype=torch.float64)]]),
    "pcgrad": lambda: mk.pcgrad(wanted(2, 3), order=[[1], [0]]),
    "beside a sparse gradient": lambda: mk.gram([[wanted(3, 2)], [wanted(3, 2).detach().to_sparse(1)]]),
    "pcgrad_weights": lambda: mk.pcgrad_weights(wanted(2, 2), [[1], [0]]),
    "vmap of gram": lambda: torch.vmap(mk.gram)(torch.ones(5, 2, 3)),
    "vmap of pcgrad_weights": lambda: torch.vmap(lambda gram: mk.pcgrad_weights(gram, project=False))(wanted(5, 2, 2)),
    "torch.func.grad": lambda: torch.func.grad(lambda grads: mk.gram(grads).sum())(torch.ones(2, 3)),
}


@pytest.mark.parametrize("call", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_no_substitute_for_what_the_reference_alone_has(call: Callable[[], Any]) -> None:
    for name in set(_backends.BACKENDS) - {"reference"}:
        message = f"^pcgrad has only the reference for derivatives and torch.func .* use_backend asks for '{name}'$"
        with mk.use_backend(name), pytest.raises(RuntimeError, match=message):
            call()
    usual = call()
    with mk.use_backend("reference"):
        torch.testing.assert_close(call(), usual, rtol=0, atol=0)


@requires.cpp_kernels
def test_gradients_that_nobody_differentiates_run_what_was_asked_for() -> None:
    with mk.use_backend("cpp"), torch.no_grad():
        grads = [[wanted(3)], [-wanted(3)]]
        assert not mk.pcgrad(grads, order=[[1], [0]])[0].any()
        assert mk.pcgrad_weights(mk.gram(grads).requires_grad_(), [[1], [0]]).tolist() == [[1.0, 1.0], [1.0, 1.0]]


@requires.cpp_kernels
def test_no_substitute_in_compiled_code() -> None:
    compiled = torch.compile(mk.gram, backend="eager", fullgraph=True)
    with mk.use_backend("cpp"), pytest.raises(Exception, match="pcgrad has only the reference for derivatives"):
        compiled(wanted(2, 3))
