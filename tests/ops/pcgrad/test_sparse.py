"""PCGrad of sparse gradients against direct projection in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.ops.pcgrad.sparse import SparseColumn
from tests.ops.pcgrad.definition import assert_agrees

Grads = list[list[Tensor | None]]
SHAPES = ((40, 3), (25,), (6, 7, 2), (8, 9), (300, 1))


def coo(indices: Any, values: Tensor, shape: tuple[int, ...], *, coalesced: bool = False) -> Tensor:
    at = torch.as_tensor(indices, dtype=torch.int64)
    found = torch.sparse_coo_tensor(at if at.dim() == 2 else at[None], values, shape, check_invariants=True)
    return found.coalesce() if coalesced else found


class Maker:
    """Random gradients, whose scales are such that the dtype holds them."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def values(self, *shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def sparse(self, shape: tuple[int, ...], sparse_dim: int, scale: float) -> Tensor:
        count = self.rng.choice((0, 1, 3, 10, 30))
        rows = [torch.randint(0, size, (count,), generator=self.generator) for size in shape[:sparse_dim]]
        values = self.values(count, *shape[sparse_dim:], scale=scale * self.rng.choice((0.0, 1.0, 1.0, 1.0)))
        return coo(torch.stack(rows), values, shape, coalesced=self.rng.random() < 0.3)

    def grads(self, num_tasks: int) -> Grads:
        scales = [2.0 ** self.rng.randint(*((-8, 4) if self.dtype == torch.float16 else (-40, 26)))] * num_tasks
        if self.rng.random() < 0.5:
            scales = [scale * 2.0 ** self.rng.randint(-4, 4) for scale in scales]
        columns = []
        for shape in SHAPES:
            sparse_dim = self.rng.randint(1, len(shape))
            kinds = self.rng.choice((("sparse",), ("sparse", "none"), ("sparse", "dense", "none"), ("dense",)))
            column: list[Tensor | None] = []
            for scale in scales:
                kind = self.rng.choice(kinds)
                if kind == "sparse":
                    column.append(self.sparse(shape, sparse_dim, scale))
                else:
                    column.append(self.values(*shape, scale=scale) if kind == "dense" else None)
            columns.append(column)
        return [list(row) for row in zip(*columns, strict=True)]


def check(grads: Grads, **options: Any) -> None:
    """Values by the definition; layouts and indices too."""
    num_tasks = len(grads)
    order = torch.tensor([random.Random(i).sample(range(num_tasks), num_tasks) for i in range(num_tasks)])
    assert_agrees(grads, order, **options)
    for result, column in zip(mk.pcgrad(grads, order=order, **options), zip(*grads, strict=True), strict=True):
        found = [grad for grad in column if grad is not None]
        if result is None:
            assert not found
            continue
        assert result.is_sparse == all(grad.is_sparse for grad in found)
        if result.is_sparse:
            assert result.is_coalesced() and result.sparse_dim() == found[0].sparse_dim()
            touched = {tuple(at) for grad in found for at in grad._indices().T.tolist()}
            assert sorted(touched) == [tuple(at) for at in result.indices().T.tolist()]
            torch.sparse_coo_tensor(result.indices(), result.values(), result.shape, check_invariants=True)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "mean", "include_self": True},
    {"max_norm": 1.0, "normalize": True},
    {"project": False, "normalize": True},
    {"eps": 1e-3, "reduction": "mean"},
]


@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int, dtype: torch.dtype, backend: str) -> None:
    make = Maker(seed, dtype)
    with mk.use_backend(backend):
        check(make.grads(make.rng.randint(1, 12)), **OPTIONS[seed % len(OPTIONS)])


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_duplicates_are_added_up_in_float64(narrow: torch.dtype) -> None:
    """One large entry, many small ones that a narrow sum would lose, and the large one taken away again."""
    many = 1 << 14
    small = 2.0**-12
    entries = torch.full((many + 2, 1), small, dtype=narrow)
    entries[0], entries[-1] = 4096, -4096
    grads: Grads = [[coo(torch.full((many + 2,), 5), entries, (9, 1))]]
    (result,) = mk.pcgrad(grads)
    assert result.to_dense()[5].item() == many * small
    assert mk.gram(grads).item() == (many * small) ** 2


def low_overlap(num_tasks: int = 5, dtype: torch.dtype = torch.float32) -> Grads:
    """Tasks that meet in few rows: 0 in all of them, 1 in two, the others in one."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for t in range(num_tasks):
        at = torch.tensor([0, *([1] if t in (1, 3) else []), *range(10 + 7 * t, 17 + 7 * t)])
        rows.append([coo(at, torch.randn(len(at), 3, generator=generator).to(dtype), (60, 3))])
    return rows


def test_tasks_that_meet_in_few_rows(dtype: torch.dtype, backend: str) -> None:
    grads = low_overlap(dtype=dtype)
    assert not SparseColumn([row[0] for row in grads]).aligned
    with mk.use_backend(backend):
        check(grads)
    dense: Grads = [*grads, [torch.randn(60, 3).to(dtype)], [None], [torch.randn(60, 3).to(dtype)]]
    with mk.use_backend(backend):
        check(dense)


def test_tasks_that_meet_nowhere(backend: str) -> None:
    grads: Grads = [[coo([2 * t, 2 * t + 1], torch.randn(2, 3), (40, 3))] for t in range(6)]
    with mk.use_backend(backend):
        check(grads)
        gram = mk.gram(grads)
    assert torch.equal(gram, gram.diagonal().diag())


def test_meetings_without_knowing_their_number() -> None:
    """As on a GPU, where the number of rows that several tasks touch would have to be waited for."""
    column = SparseColumn([row[0] for row in low_overlap()])
    torch.testing.assert_close(column._meetings(compact=False), column._meetings(compact=True), rtol=1e-14, atol=0)


def test_tasks_of_one_batch_are_aligned_without_a_copy() -> None:
    rows = torch.tensor([7, 3, 3, 0])
    column = SparseColumn([coo(rows, torch.randn(4, 2), (9, 2)) for _ in range(3)])
    assert column.aligned
    assert [len(values) for values in column.values.values()] == [3, 3, 3]
    assert not column.dense and len(column.for_gram()) == 3


def test_nothing_is_as_large_as_the_parameter(backend: str) -> None:
    """A dense tensor of these shapes would not fit any memory."""
    huge, wide = (1 << 40, 4), (1 << 30, 1 << 30)
    grads: Grads = [
        [
            coo([t, 1 << 39, (1 << 40) - 1 - t], torch.randn(3, 4), huge),
            coo([[t, (1 << 30) - 1], [5, (1 << 30) - 1]], torch.randn(2), wide),
        ]
        for t in range(6)
    ]
    order = [random.Random(i).sample(range(6), 6) for i in range(6)]
    with mk.use_backend(backend):
        a, b = mk.pcgrad(grads, order=order)
    small: Grads = []
    for t, (first, second) in enumerate(grads):
        small.append(
            [
                coo([t, 8, 15 - t], first._values(), (16, 4)),
                coo([[t, 15], [5, 15]], second._values(), (16, 16)),
            ]
        )
    want_a, want_b = mk.pcgrad(small, order=order)
    torch.testing.assert_close(a.values(), want_a.values())
    torch.testing.assert_close(b.values(), want_b.values())
    assert a.shape == huge and b.shape == wide
    assert b.indices()[:, -1].tolist() == [(1 << 30) - 1] * 2


def test_results_do_not_change_from_run_to_run() -> None:
    make = Maker(11, torch.float32)
    grads = make.grads(6) + make.grads(6)
    order = [random.Random(i).sample(range(12), 12) for i in range(12)]
    first = mk.pcgrad(grads, order=order)
    gram = mk.gram(grads)
    for _ in range(3):
        assert torch.equal(mk.gram(grads), gram)
        for a, b in zip(first, mk.pcgrad(grads, order=order), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert torch.equal(a.to_dense(), b.to_dense())


def test_autocast_stays_out() -> None:
    for grads in (low_overlap(), Maker(2, torch.float32).grads(4)):
        order = [random.Random(i).sample(range(len(grads)), len(grads)) for i in range(len(grads))]
        plain = mk.pcgrad(grads, order=order)
        with torch.autocast("cpu"):
            cast = mk.pcgrad(grads, order=order)
        for a, b in zip(plain, cast, strict=True):
            assert a is b is None or torch.equal(a.to_dense(), b.to_dense())


def test_arguments_are_left_alone() -> None:
    grads = [[coo([3, 1, 3], torch.randn(3, 2), (5, 2))], [torch.randn(5, 2)], [coo([1, 3], torch.randn(2, 2), (5, 2))]]
    before = [row[0].clone() for row in grads]
    (result,) = mk.pcgrad(grads)
    result.zero_()
    (result,) = mk.pcgrad(grads[2:])
    result.zero_()
    for (grad,), kept in zip(grads, before, strict=True):
        assert not grad.is_sparse or not grad.is_coalesced()
        assert torch.equal(grad.to_dense(), kept.to_dense())


def test_one_task_gets_its_gradient(dtype: torch.dtype) -> None:
    grad = coo([4, 1, 4], torch.tensor([[1.0], [2.0], [3.0]], dtype=dtype), (6, 1))
    (result,) = mk.pcgrad([[grad]])
    assert torch.equal(result.to_dense(), grad.to_dense())
    assert result.values().data_ptr() != mk.pcgrad([[result]])[0].values().data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    for grads in ([[coo([1, 2], torch.ones(2, 2), (9, 2))] for _ in range(3)], low_overlap()):
        grads[1][0]._values()[0] = bad  # type: ignore[union-attr]
        (result,) = mk.pcgrad(grads)
        assert not torch.isfinite(result.to_dense()).all()


def test_embedding_gradients_that_are_wanted_twice() -> None:
    """Dense gradients beside sparse ones keep their derivative; a sparse one that wants its own is refused."""
    dense = [torch.randn(5, requires_grad=True) for _ in range(2)]
    sparse = [coo([1, 3], torch.randn(2, 2), (9, 2)) for _ in range(2)]
    results = mk.pcgrad([[d, s] for d, s in zip(dense, sparse, strict=True)], order=[[1], [0]])
    found = torch.autograd.grad(results[1].to_dense().sum() + results[0].sum(), dense)
    assert all(torch.isfinite(grad).all() for grad in found)
    wanted = coo([1], torch.ones(1, 2), (9, 2)).requires_grad_()
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\] must not require gradients"):
        mk.pcgrad([[sparse[0]], [wanted]])
    with torch.no_grad():
        mk.pcgrad([[sparse[0]], [wanted]])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_mistakes() -> None:
    good = coo([1], torch.ones(1, 2), (9, 2))
    flat = coo([[1], [0]], torch.ones(1), (9, 2))
    scalar = torch.sparse_coo_tensor(
        torch.empty(0, 1, dtype=torch.int64), torch.ones(1, 9, 2), (9, 2), check_invariants=True
    )
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\] must have 1 sparse dimensions as other tasks have, got 2"):
        mk.pcgrad([[good], [flat]])
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] must have at least one sparse dimension, got none"):
        mk.pcgrad([[scalar], [good]])
    with pytest.raises(TypeError, match=r"grads\[1\]\[0\] must be dense or sparse_coo, got layout torch.sparse_csr"):
        mk.pcgrad([[good], [torch.eye(9, 2).to_sparse_csr()]])
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\] must have shape \[9, 2\]"):
        mk.gram([[good], [coo([1], torch.ones(1, 2), (8, 2))]])
    with pytest.raises(TypeError, match=r"grads must be a dense matrix .*, got layout torch.sparse_coo"):
        mk.pcgrad(good)
