"""PCGrad against direct projection in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import random_task_gradients
from tests.ops.pcgrad.definition import OPTIONS, PROMISED, assert_agrees, assert_rounded


def conflicting(num_tasks: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Tasks of which about a third of the pairs conflict."""
    common = [torch.randn(shape) for shape in shapes]
    signs = torch.randn(num_tasks).tolist()
    return [[(torch.randn_like(c) + sign * c).to(dtype) for c in common] for sign in signs]


def random_order(num_tasks: int) -> Tensor:
    return torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)])


@pytest.mark.parametrize("seed", range(100))
def test_random_lists(seed: int, backend: str) -> None:
    case = random_task_gradients(seed, sparse=0.25)
    with mk.use_backend(backend):
        assert_agrees(case.grads, case.order, **OPTIONS[seed % len(OPTIONS)])


@pytest.mark.parametrize("isa", _extension.instruction_sets()[:-1])
@pytest.mark.parametrize("seed", range(2000, 2030))
def test_every_instruction_set(seed: int, isa: str) -> None:
    case = random_task_gradients(seed)
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert_agrees(case.grads, case.order, **OPTIONS[seed % len(OPTIONS)])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8, 64])
def test_options(num_tasks: int, options: dict[str, Any], backend: str) -> None:
    grads = conflicting(num_tasks, (3, 4), (50,), (1,))
    with mk.use_backend(backend):
        assert_agrees(grads, random_order(num_tasks), **options)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "reduction": "mean"}], ids=str)
def test_without_projections_no_order_is_drawn(options: dict[str, Any], backend: str) -> None:
    grads = conflicting(3, (3, 4), (50,))
    before = torch.get_rng_state()
    with mk.use_backend(backend):
        found = mk.pcgrad(grads, project=False, **options)
        assert torch.equal(torch.get_rng_state(), before)
        expected = mk.pcgrad(grads, project=False, order=random_order(3), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_options_change_the_result() -> None:
    """So that the comparisons above compare something. A projection onto oneself matters in few cases."""
    seen = set()
    for _ in range(200):
        grads, order = conflicting(8, (3,)), random_order(8)
        results = [mk.pcgrad(grads, order=order, **options)[0] for options in OPTIONS]
        seen |= {i for i, result in enumerate(results[1:], 1) if not torch.equal(result, results[0])}
    assert seen == set(range(1, len(OPTIONS)))


def test_matrix(dtype: torch.dtype, backend: str) -> None:
    matrix = torch.cat([g for (g,) in conflicting(6, (1, 1001), dtype=dtype)])
    order = random_order(6)
    with mk.use_backend(backend):
        found = mk.pcgrad(matrix, order=order)
        (expected,) = mk.pcgrad([[row] for row in matrix], order=order)
        strided = mk.pcgrad(matrix.T.contiguous().T, order=order)
    assert found.shape == (1001,) and found.dtype == dtype
    assert torch.equal(found, expected) and torch.equal(strided, expected)


def test_channels_last_stays(backend: str) -> None:
    grads = [[torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)] for _ in range(3)]
    with mk.use_backend(backend):
        assert_agrees(grads, random_order(3))
        (found,) = mk.pcgrad(grads)
        assert found.is_contiguous(memory_format=torch.channels_last)
        mixed = [[grads[0][0].contiguous()], *grads[1:]]
        assert mk.pcgrad(mixed)[0].is_contiguous()


def test_gram_is_accurate(backend: str) -> None:
    """20 million float32 values, in one large parameter and many small ones."""
    grads = [[torch.randn(n) for n in (4_000_000, *[10_001] * 100)] for _ in range(4)]
    exact = torch.zeros(4, 4, dtype=torch.float64)
    for column in zip(*grads, strict=True):
        flat = torch.stack(column).double()
        exact += flat @ flat.T
    with mk.use_backend(backend):
        found = mk.gram(grads)
    assert found.dtype == torch.float64
    norm = exact.diagonal().sqrt()
    # Beyond float64's own, errors of float32 have either sign, and are of 16 terms each.
    most = 1e-12 if backend == "reference" else 1e-9
    assert float(((found - exact) / (norm[:, None] * norm)).abs().max()) < most


def gram_error(grads: list[list[Tensor]]) -> float:
    """The largest error of `mk.gram`, as a share of |g_i| |g_j|."""
    flat = torch.stack([torch.cat([grad.double().flatten() for grad in row]) for row in grads])
    exact = flat @ flat.T
    norm = exact.diagonal().sqrt()
    return float(((mk.gram(grads) - exact) / (norm[:, None] * norm)).abs().max())


@pytest.mark.parametrize("isa", _extension.instruction_sets())
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_where_every_error_has_one_sign(narrow: torch.dtype, isa: str) -> None:
    """Terms that are all alike, or small ones that follow a large one: long sums in float32 would lose digits."""
    spikes = torch.full((100_000,), 1e-3)
    spikes[:: 16 * 64] = 1.0
    rows = [torch.full((100_000,), 0.1), torch.full((100_000,), 1 / 3), spikes, spikes * 1.3]
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert gram_error([[row.to(narrow)] for row in rows]) < PROMISED


@pytest.mark.parametrize("flushed", [False, True], ids=["", "subnormals are zeros"])
@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_pieces_out_of_range_beside_others(isa: str, flushed: bool) -> None:
    """Some parameters' squares are too small or too large for float32, some are zeros, for some tasks alone."""
    scales = ((1e-30, 1.0, 0.0), (1e-24, 1e-24, 1e-24), (1e-19, 0.0, 1e-3), (-0.0, 1e-10, 1e-22))
    grads = [[torch.randn(70_000) * scale for scale in row] for row in scales]
    grads += [[grad * 1e30 for grad in grads[1]]]
    tiny, huge = [[row[0]] for row in grads[:3]], [[row[1] * 1e30] for row in grads[:2]]
    torch.set_flush_denormal(flushed)
    try:
        with _extension.instruction_set(isa), mk.use_backend("cpp"):
            errors = [gram_error(lists) for lists in (grads, tiny, huge)]
    finally:
        torch.set_flush_denormal(False)
    assert max(errors) < PROMISED


@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_squares_that_are_flushed_beside_larger_ones(isa: str) -> None:
    """Dot products of bfloat16 take subnormal squares for zeros, which here are a part of a sum that is none."""
    values = torch.tensor([2.0**-62, 1.25 * 2.0**-64], dtype=torch.bfloat16).repeat_interleave(20_000)
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert gram_error([[values]]) < PROMISED


@pytest.mark.parametrize("scale", [1e-25, 1e-38, 1e25, 1e37])
def test_squares_out_of_range(scale: float, backend: str) -> None:
    """Gradients that float32 holds, and whose squares it does not."""
    grads = [[g * scale for g in row] for row in conflicting(4, (100,), (3, 3))]
    with mk.use_backend(backend):
        assert_agrees(grads, random_order(4))


def test_extreme_scales_together(backend: str) -> None:
    grads = [[g * scale for g in row] for row, scale in zip(conflicting(3, (99,)), (1e-25, 1.0, 1e25), strict=True)]
    with mk.use_backend(backend):
        assert_agrees(grads, random_order(3))


def test_same_bits_whatever_the_threads(backend: str) -> None:
    grads = conflicting(5, (200_003,), (7,), (1000, 101))
    order = random_order(5)
    with mk.use_backend(backend):
        first = mk.gram(grads), mk.pcgrad(grads, order=order)
        if backend == "cpp":
            torch.set_num_threads(2)
        second = mk.gram(grads), mk.pcgrad(grads, order=order)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_same_bits_wherever_gradients_lie(backend: str) -> None:
    """At another address; where strides are others, too, values are right, but bits may be others."""

    def moved(grad: Tensor) -> Tensor:
        return torch.zeros(grad.numel() + 1).as_strided(grad.shape, grad.stride(), 1).copy_(grad)

    grads = conflicting(4, (301, 17), (1000, 3))
    transposed = [[grad.T.contiguous().T for grad in row] for row in grads]
    with mk.use_backend(backend):
        for lists in (grads, transposed):
            assert torch.equal(mk.gram([[moved(grad) for grad in row] for row in lists]), mk.gram(lists))
        assert gram_error(transposed) < PROMISED


def test_random_order_comes_from_the_generator() -> None:
    grads = conflicting(8, (500,))
    grads[0] = [-sum(row[0] for row in grads[1:])]

    def run(generator: torch.Generator | None) -> Tensor:
        return mk.pcgrad(grads, generator=generator)[0]

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(run(seeded(1)), run(seeded(1)))
    assert len({tuple(run(seeded(seed)).tolist()) for seed in range(5)}) > 1
    state = torch.random.get_rng_state()
    run(seeded(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(3)
    first = run(None)
    torch.manual_seed(3)
    assert torch.equal(run(None), first)


def test_weights_describe_the_result(backend: str) -> None:
    grads = conflicting(6, (40,), (5, 5))
    order = random_order(6)
    with mk.use_backend(backend):
        weights = mk.pcgrad_weights(mk.gram(grads), order, max_norm=3.0)
        found = mk.pcgrad(grads, order=order, max_norm=3.0)
    assert weights.shape == (6, 6) and weights.dtype == torch.float64
    size = sum(float(g.square().sum()) for row in grads for g in row) ** 0.5
    for p, result in enumerate(found):
        by_hand = sum(c * row[p].double() for c, row in zip(weights.sum(0), grads, strict=True))
        assert_rounded(result, by_hand, 1e-13 * size)


def test_order_of_a_wrong_device_dtype_or_kind() -> None:
    grads = conflicting(3, (20,))
    order = [[1, 2], [2, 0], [0, 1]]
    expected = mk.pcgrad(grads, order=torch.tensor(order))[0]
    assert torch.equal(mk.pcgrad(grads, order=order)[0], expected)
    assert torch.equal(mk.pcgrad(grads, order=torch.tensor(order, dtype=torch.int32))[0], expected)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"normalize": True}], ids=str)
def test_non_finite_gradients_show(value: float, options: dict[str, Any], backend: str) -> None:
    grads = conflicting(3, (10,), (4,))
    grads[1][0][3] = value
    with mk.use_backend(backend):
        found = mk.pcgrad(grads, order=random_order(3), **options)
    assert not torch.isfinite(found[0][3])


def test_none_is_not_multiplied(backend: str) -> None:
    """A task without a gradient adds nothing, not even NaN, where another task's is infinite."""
    grads = [[None, torch.ones(3)], [torch.tensor([float("inf"), 1.0]), None]]
    with mk.use_backend(backend):
        assert mk.gram(grads).tolist() == [[3.0, 0.0], [0.0, float("inf")]]


def test_nothing_at_all(backend: str) -> None:
    with mk.use_backend(backend):
        assert mk.pcgrad([[None, None], [None, None]]) == [None, None]
        assert mk.pcgrad([[], []]) == []
        assert mk.gram([[None], [None]]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert mk.pcgrad(torch.zeros(3, 0)).shape == (0,)


def test_inputs_are_left_alone(backend: str) -> None:
    grads = conflicting(4, (100,))
    before = [[g.clone() for g in row] for row in grads]
    with mk.use_backend(backend):
        found = mk.pcgrad(grads)
        found[0].zero_()
    assert all(torch.equal(a, b) for x, y in zip(grads, before, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options: dict[str, Any]) -> None:
    """A double backward through the projection, as meta-learning takes it."""
    grads = [[g.requires_grad_() for g in row] for row in conflicting(3, (4,), (2, 2), dtype=torch.float64)]
    order = random_order(3)

    def function(*flat: Tensor) -> Any:
        return tuple(mk.pcgrad([list(flat[:2]), list(flat[2:4]), list(flat[4:])], order=order, **options))

    leaves = tuple(g for row in grads for g in row)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_func_transforms() -> None:
    matrices = torch.randn(5, 4, 30, dtype=torch.float64)
    order = random_order(4)
    each = torch.stack([mk.pcgrad(m, order=order) for m in matrices])
    torch.testing.assert_close(torch.vmap(lambda m: mk.pcgrad(m, order=order))(matrices), each)
    jacobian = torch.func.jacrev(lambda m: mk.pcgrad(m, order=order))(matrices[0])
    assert jacobian.shape == (30, 4, 30)
    total = torch.func.grad(lambda m: mk.pcgrad(m, order=order).sum())(matrices[0])
    torch.testing.assert_close(total, jacobian.sum(0))


def test_operators_under_vmap() -> None:
    ops = torch.ops.mtlkernels
    a, b = torch.randn(3, 4, 5), torch.randn(4, 5)
    grams = torch.vmap(lambda x: ops.pcgrad_gram([x, None, b, x], 2))(a)
    torch.testing.assert_close(grams, torch.stack([ops.pcgrad_gram([x, None, b, x], 2) for x in a]))
    coefficients = torch.randn(3, 2, dtype=torch.float64)
    (combined,) = torch.vmap(lambda x, c: ops.pcgrad_combine([x, b], 2, c))(a, coefficients)
    each = torch.stack([ops.pcgrad_combine([x, b], 2, c)[0] for x, c in zip(a, coefficients, strict=True)])
    torch.testing.assert_close(combined, each)


def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.mtlkernels
    images = [torch.randn(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last) for _ in range(2)]
    flat = [torch.randn(5).to(dtype), None, *images]
    torch.library.opcheck(ops.pcgrad_gram.default, (flat, 2))
    gram = ops.pcgrad_gram(flat, 2)
    order = torch.tensor([[1], [0]])
    torch.library.opcheck(ops.pcgrad_weights.default, (gram, order, False, 1.0, True, True, 0.0, True))
    torch.library.opcheck(ops.pcgrad_combine.default, (flat, 2, torch.randn(2, dtype=torch.float64)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler: str) -> None:
    grads = conflicting(3, (6, 5), (9,))
    order = random_order(3)
    options: dict[str, Any] = {"max_norm": 1.0, "reduction": "mean"}

    def function(a: Any, order: Tensor) -> Any:
        return mk.pcgrad(a, order=order, **options)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(grads, order), function(grads, order))
    drawn = torch.compile(lambda a: mk.pcgrad(a), fullgraph=True, backend=compiler)(grads)
    assert [g.shape for g in drawn] == [g.shape for g in grads[0]]


def test_autocast_changes_nothing(backend: str) -> None:
    grads = conflicting(3, (50,))
    order = random_order(3)
    with mk.use_backend(backend):
        expected = mk.pcgrad(grads, order=order)
        with torch.autocast("cpu", torch.bfloat16):
            found = mk.pcgrad(grads, order=order)
    assert torch.equal(found[0], expected[0])


def test_an_invalid_entry_of_order_shows(backend: str) -> None:
    """Where it is not checked, as on a GPU, the row is NaN and nothing is read out of bounds."""
    gram = mk.gram(conflicting(3, (20,)))
    order = torch.tensor([[1, 2], [0, 7], [-1, 0]])
    run = mk._backends.implementation("pcgrad", "weights", backend, gram)
    rows, coefficients = run(gram, order, False, None, False, True, 0.0, False)
    assert rows.isnan().all(1).tolist() == [False, True, True] and coefficients.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_task(value: float, backend: str) -> None:
    """One task's NaN or infinity stays in its gradient: a conflict of two others is repaired as without it."""
    grads = [torch.tensor(g) for g in ([1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, value])]
    order = torch.tensor([[1], [0], [0]])
    projected = [grads[0] + grads[1] / 2, grads[1] + grads[0], grads[2]]
    with mk.use_backend(backend):
        got = mk.pcgrad([[g] for g in grads], order=torch.cat([order, torch.tensor([[2], [2], [1]])], 1))[0]
    expected = sum(projected)
    torch.testing.assert_close(got[:2], expected[:2])
    assert got[2].isnan() if value != value else got[2] == value


def test_what_is_minus_infinity_is_projected_on(backend: str) -> None:
    """What follows then is not finite, so that nothing else is projected on."""
    grads = [torch.tensor(g) for g in ([1.0, 0.0, 1.0], [0.0, 1.0, -1.0], [-torch.inf, 0.0, 0.0])]
    gram = mk.gram([[g] for g in grads])
    with mk.use_backend(backend):
        before, behind = (mk.pcgrad_weights(gram, [first, [0, 2], [0, 1]])[0] for first in ([1, 2], [2, 1]))
    assert before.tolist() == [1.0, 0.5, 0.0]  # as g_0 + g_1 / 2 has an inner product of NaN with it
    assert behind[:2].tolist() == [1.0, 0.0] and behind[2].isnan()


@pytest.mark.parametrize("normalize", [False, True])
def test_numbers_below_zero(normalize: bool, backend: str) -> None:
    """Which operators that are called directly may get: no norm to clip to; and what ``|g_j|^2`` falls short by."""
    gram = torch.tensor([[1.0, -1.0], [-1.0, 4.0]], dtype=torch.float64)
    order = torch.tensor([[1], [0]])
    run = mk._backends.implementation("pcgrad", "weights", backend, gram)

    def weights(max_norm: float | None, eps: float, normalize: bool = False) -> Tensor:
        rows: Tensor = run(gram, order, False, max_norm, normalize, True, eps, False)[0]
        return rows

    assert torch.equal(weights(-1.0, 0.0, normalize), weights(None, 0.0, normalize))
    assert weights(None, -2.0).tolist() == [[1.0, 0.5], [-1.0, 1.0]]
    assert weights(None, -4.0)[0].tolist() == [1.0, torch.inf]
