"""csrc/cuda's kernels, run on an emulated device: what each computes, and that threads wait for each other."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops.pcgrad import cuda, parameters, reference
from mtlkernels.testing import DTYPES, random_task_gradients
from tests.csrc import library
from tests.ops.pcgrad.definition import EXACT, assert_agrees

pytestmark = library.needs_compiler
EPS = torch.finfo(torch.float64).eps
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 100, 255, 256, 257, 1000)


def gram(grads: Sequence[Tensor | None], tasks: int, seed: int = 0) -> Tensor:
    with library.operators(seed):
        return cuda.gram(grads, tasks)


def combine(grads: Sequence[Tensor | None], tasks: int, coefficients: Tensor, seed: int = 0) -> list[Tensor]:
    with library.operators(seed):
        return cuda.combine(grads, tasks, coefficients)


def weights(gram: Tensor, order: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    with library.operators():
        return cuda.weights(gram, order, *options)


def placed(values: Tensor, offset: int) -> Tensor:
    """The values in the middle of NaNs, so that reading past them shows; off a multiple of 16 bytes by ``offset``."""
    around = values.new_full((values.numel() + 64,), torch.nan)
    start = (-around.data_ptr() // around.element_size()) % 16 + 16 + offset
    inside = around[start : start + values.numel()]
    inside.copy_(values)
    return inside


def random_list(seed: int, tasks: int, sizes: Sequence[int] = SIZES, parameters: int = 6) -> list[Tensor | None]:
    """Gradients of all dtypes and scales, some None, zero or unaligned."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    scales = [10 ** rng.uniform(-12, 8) for _ in range(tasks)]
    flat: list[Tensor | None] = []
    for _ in range(parameters):
        size, dtype, aligned = rng.choice(sizes), rng.choice(DTYPES), rng.random() < 0.6
        column: list[Tensor | None] = []
        for scale in scales:
            values = torch.randn(size, generator=generator, dtype=torch.float64) * (0 if rng.random() < 0.1 else scale)
            limit = torch.finfo(dtype).max / 8
            values = values.clamp(-limit, limit).to(dtype)
            column.append(placed(values, 0 if aligned else rng.randint(1, 7)) if rng.random() < 0.8 else None)
        if all(grad is None for grad in column):
            column[rng.randrange(tasks)] = placed(torch.ones(size, dtype=dtype), 0)
        flat += column
    return flat


def assert_gram(found: Tensor, grads: Sequence[Tensor | None], tasks: int) -> None:
    """Off by no more than additions in double can be."""
    exact = reference.gram(grads, tasks)
    elements = sum(grad.numel() for grad in grads if grad is not None)
    norms = exact.diagonal().sqrt()
    assert torch.equal(found, found.T)
    assert ((found - exact).abs() <= (elements + 8) * EPS * norms.unsqueeze(1) * norms).all()


def assert_combined(found: Sequence[Tensor], grads: Sequence[Tensor | None], tasks: int, coefficients: Tensor) -> None:
    """Off by no more than rounding to the dtype, after additions in double."""
    exact = reference.combine([None if grad is None else grad.double() for grad in grads], tasks, coefficients)
    size = reference.combine(
        [None if grad is None else grad.double().abs() for grad in grads], tasks, coefficients.abs()
    )
    columns = [grads[start : start + tasks] for start in range(0, len(grads), tasks)]
    for got, want, sizes, column in zip(found, exact, size, columns, strict=True):
        like = next(grad for grad in column if grad is not None)
        assert got.dtype == like.dtype and got.shape == like.shape
        limits = torch.finfo(like.dtype)
        got = got.double()
        budget = limits.eps * want.abs() + tasks * 4 * EPS * sizes + limits.smallest_normal * limits.eps
        inside = want.abs() < limits.max * (1 - limits.eps)
        assert ((got - want).abs()[inside] <= budget[inside]).all()
        assert (got[~inside].abs() >= limits.max * (1 - limits.eps)).all()


@pytest.mark.parametrize("tasks", range(1, 65))
def test_every_number_of_tasks(tasks: int) -> None:
    grads = random_list(tasks, tasks, SIZES if tasks <= 16 else SIZES[:12], 4)
    assert_gram(gram(grads, tasks), grads, tasks)
    coefficients = torch.randn(tasks, dtype=torch.float64)
    assert_combined(combine(grads, tasks, coefficients), grads, tasks, coefficients)


@pytest.mark.parametrize("seed", range(40))
def test_random_lists(seed: int) -> None:
    tasks = random.Random(seed).choice((1, 2, 3, 4, 5, 7, 8, 9, 12, 16))
    grads = random_list(100 + seed, tasks)
    assert_gram(gram(grads, tasks, seed), grads, tasks)
    coefficients = torch.randn(tasks, dtype=torch.float64)
    assert_combined(combine(grads, tasks, coefficients, seed), grads, tasks, coefficients)


@pytest.mark.parametrize("offset", [0, 1])
def test_parameters_of_several_chunks(dtype: torch.dtype, offset: int) -> None:
    for tasks in (1, 3, 10):
        grads: list[Tensor | None] = [
            placed(torch.randn(size).to(dtype), offset) for size in (8192, 4097) for _ in range(tasks)
        ]
        assert_gram(gram(grads, tasks), grads, tasks)
        coefficients = torch.randn(tasks, dtype=torch.float64)
        assert_combined(combine(grads, tasks, coefficients), grads, tasks, coefficients)


@pytest.mark.parametrize("parameters", [33, 64, 65, 1040])
def test_more_blocks_than_a_group_and_more_chunks_than_blocks(parameters: int) -> None:
    """Blocks of more than one chunk go from parameters that have some tasks' gradients to such that have others'."""
    grads: list[Tensor | None] = [torch.randn(3) for _ in range(3 * parameters)]
    for p in range(parameters):
        if p % 5 < 3:
            grads[3 * p + p % 5] = None
    assert_gram(gram(grads, 3), grads, 3)


@pytest.mark.parametrize("tasks", [2, 8, 20])
def test_the_bits_do_not_depend_on_the_order_of_blocks_and_threads(tasks: int) -> None:
    grads = random_list(tasks, tasks, (5, 100, 257), 40)
    first = gram(grads, tasks, 0)
    coefficients = torch.randn(tasks, dtype=torch.float64)
    combined = combine(grads, tasks, coefficients, 0)
    for seed in (1, 2):
        assert torch.equal(gram(grads, tasks, seed), first)
        again = combine(grads, tasks, coefficients, seed)
        assert all(torch.equal(a, b) for a, b in zip(again, combined, strict=True))


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e38])
def test_squares_outside_the_range_of_float32(scale: float) -> None:
    grads: list[Tensor | None] = [torch.randn(500).clamp(-3, 3) * scale for _ in range(3)]
    found, exact = gram(grads, 3), reference.gram(grads, 3)
    norms = exact.diagonal().sqrt()
    assert (norms > 0).all() and torch.isfinite(norms).all()
    assert ((found - exact).abs() <= 1e-12 * norms.unsqueeze(1) * norms).all()


def test_coefficients_outside_the_range_of_float32() -> None:
    grads: list[Tensor | None] = [torch.randn(300) * 1e-30, torch.randn(300) * 1e20]
    coefficients = torch.tensor([1e50, -1e-60], dtype=torch.float64)
    assert_combined(combine(grads, 2, coefficients), grads, 2, coefficients)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_visible_and_stays_where_it_is(value: float) -> None:
    for tasks in (3, 9):
        grads: list[Tensor | None] = [torch.randn(40) for _ in range(2 * tasks)]
        grads[1][7] = value  # type: ignore[index]
        grads[2] = None  # has no part in the product with the second gradient
        found, exact = gram(grads, tasks), reference.gram(grads, tasks)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert not found[1].isfinite()[1] and found[1].isfinite()[2]
        for coefficient in (2.0, 0.0):
            coefficients = torch.full((tasks,), coefficient, dtype=torch.float64)
            combined = combine(grads, tasks, coefficients)
            expected = reference.combine(grads, tasks, coefficients)
            torch.testing.assert_close(combined, expected, equal_nan=True)


def test_nothing_to_add_up() -> None:
    grads: list[Tensor | None] = [torch.empty(0) for _ in range(6)]
    assert torch.equal(gram(grads, 3), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_nothing_but_the_results_is_written(offset: int) -> None:
    grads = random_list(offset, 5)
    made: list[tuple[Tensor, Tensor]] = []

    def inside(like: Tensor) -> Tensor:
        around = torch.full((like.numel() + 64,), 7, dtype=like.dtype)
        start = (-around.data_ptr() // around.element_size()) % 16 + 16 + offset
        made.append((around, around[start : start + like.numel()]))
        return made[-1][1]

    coefficients = torch.randn(5, dtype=torch.float64)
    with mock.patch.object(torch, "empty_like", inside):
        found = combine(grads, 5, coefficients)
    assert_combined(found, grads, 5, coefficients)
    for around, result in made:
        result.fill_(7)
        assert (around == 7).all()


def direct(vectors: Tensor, order: Tensor, include_self: bool, eps: float) -> Tensor:
    """The projections on the gradients themselves."""
    projected = vectors.clone()
    for i, row in enumerate(order.tolist()):
        for j in row:
            inner = projected[i] @ vectors[j]
            if inner < 0 and (j != i or include_self):
                projected[i] -= inner / (vectors[j] @ vectors[j] + eps) * vectors[j]
    return projected


@pytest.mark.parametrize("tasks", [*range(1, 13), 31, 32, 33, 63, 64])
def test_projections(tasks: int) -> None:
    for include_self in (False, True):
        for columns in (tasks - 1, tasks):
            vectors = torch.randn(tasks, tasks + 3, dtype=torch.float64)
            order = torch.stack([torch.randperm(tasks)[:columns] for _ in range(tasks)])
            eps = 0.1 if include_self else 0.0
            found, coefficients = weights(
                vectors @ vectors.T, order, include_self, None, False, True, eps, columns == tasks
            )
            exact = direct(vectors, order, include_self, eps)
            torch.testing.assert_close(found @ vectors, exact, rtol=1e-9, atol=1e-9)
            expected = found.mean(0) if columns == tasks else found.sum(0)
            torch.testing.assert_close(coefficients, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_options_of_the_projections(seed: int) -> None:
    rng = random.Random(seed)
    tasks = rng.randint(1, 20)
    vectors = torch.randn(tasks, 4, dtype=torch.float64) * 10 ** rng.uniform(-30, 30)
    vectors[torch.rand(tasks) < 0.2] = 0
    products = vectors @ vectors.T
    order = torch.stack([torch.randperm(tasks) for _ in range(tasks)])
    max_norm = rng.choice((None, float(products.diagonal().max().sqrt()) / 2 or 1.0))
    options = (rng.random() < 0.5, max_norm, rng.random() < 0.5, rng.random() < 0.8, rng.choice((0.0, 1e-8)))
    for mean in (False, True):
        found, expected = weights(products, order, *options, mean), reference.weights(products, order, *options, mean)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_an_order_out_of_range_makes_its_row_nan() -> None:
    products = torch.eye(4, dtype=torch.float64)
    for wrong in (-1, 4, 2**40, -(2**40)):
        order = torch.tensor([[1, 2, 3], [0, wrong, 3], [0, 1, 3], [0, 1, 2]])
        rows, coefficients = weights(products, order, False, None, False, True, 0.0, False)
        assert rows[1].isnan().all() and coefficients.isnan().all()
        assert torch.equal(rows[[0, 2, 3]], products[[0, 2, 3]])


@pytest.mark.parametrize("seed", range(30))
def test_the_public_function(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_cuda(_: str, direction: str, backend: Any, like: Any, *args: Any) -> Any:
        ran.append(direction)
        return getattr(cuda, direction)(*args)

    monkeypatch.setattr(parameters, "direct_to_cpp", lambda like: False)  # where lists on a CPU go
    monkeypatch.setattr(parameters, "run_operator", run_cuda)
    monkeypatch.setattr(_backends, "implementation", lambda op, direction, *_: getattr(cuda, direction))
    case = random_task_gradients(seed)
    rng = random.Random(seed)
    options = {
        "reduction": rng.choice(("sum", "mean")),
        "include_self": rng.random() < 0.5,
        "normalize": rng.random() < 0.2,
        "project": rng.random() < 0.8,
    }
    with library.operators(seed):
        assert_agrees(case.grads, case.order, EXACT, **options)
    assert ran == ["gram", "combine"]


def test_more_tasks_than_the_kernels_take() -> None:
    grads: list[Tensor | None] = [torch.ones(1)] * 65
    message = "takes at most 64 tasks, got 65"
    with pytest.raises(RuntimeError, match=message):
        cuda.gram(grads, 65)
    with pytest.raises(RuntimeError, match=message):
        cuda.combine(grads, 65, torch.ones(65, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=message):
        cuda.weights(torch.eye(65, dtype=torch.float64), None, False, None, False, True, 0.0, False)


A, B = torch.ones(3), torch.ones(2, 2)
D = torch.ones(3, dtype=torch.float64)
PLAIN = (None, False, None, False, True, 0.0, False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cuda.gram([A, A, A], 2), ValueError, r"num_tasks = 2 entries a parameter, got 3"),
        (lambda: cuda.gram([A], 0), ValueError, r"num_tasks must be at least 1, got 0"),
        (lambda: cuda.gram([A, B], 2), ValueError, r"grads\[1\]\[0\] must have shape \[3\] as .* have, got \[2, 2\]"),
        (
            lambda: cuda.gram([A, D], 2),
            TypeError,
            r"grads\[1\]\[0\] must have dtype torch.float32 as .* got torch.float64",
        ),
        (lambda: cuda.gram([A.int()], 1), TypeError, r"must be float32, bfloat16, float16 or float64, got torch.int32"),
        (lambda: cuda.gram([A, A.to("meta")], 2), ValueError, r"grads\[1\]\[0\] must be on cpu as .* is, got meta"),
        (lambda: cuda.gram([A.to_sparse()], 1), TypeError, r"grads\[0\]\[0\] must be dense, got .* torch.sparse_coo"),
        (lambda: cuda.combine([None, None], 2, D[:2]), ValueError, r"a gradient for each parameter, got none for 0"),
        (lambda: cuda.combine([A, A], 2, D), ValueError, r"coefficients must have shape \[2\] in float64, got \[3\]"),
        (lambda: cuda.combine([A], 1, D[:1].to("meta")), ValueError, r"grads must be on meta .*, got cpu"),
        (
            lambda: cuda.weights(D[:2].expand(3, 2), *PLAIN),
            ValueError,
            r"gram must have shape \[T, T\] .* got \[3, 2\]",
        ),
        (lambda: cuda.weights(B, *PLAIN), TypeError, r"gram must be float64, got torch.float32"),
        (lambda: cuda.weights(B.double(), A.long(), *PLAIN[1:]), ValueError, r"order must have a row for each of 2"),
    ],
)
def test_wrong_calls_of_the_operators(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_emulation_notices_threads_that_do_not_meet() -> None:
    loaded = library.load()
    assert b"waits forever" in loaded.returns_before_a_barrier()
    assert b"wait for each other on lines" in loaded.takes_different_barriers()
    assert {loaded.reads_too_early(seed) for seed in range(5)} != {64.0}
