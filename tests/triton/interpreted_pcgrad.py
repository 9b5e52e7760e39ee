"""PCGrad's kernels on CPU tensors; ``test_interpreter.py`` runs this under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mtlkernels._backends import interpreting
from mtlkernels.ops.pcgrad import reference
from tests.triton.pcgrad_cases import (
    CHUNKS,
    SHAPES,
    assert_combined,
    assert_gram,
    check_list,
    check_public,
    check_weights,
    crowded,
    every_option,
    extreme,
    products,
    random_list,
    random_order,
    sized,
)

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")
# What does not fit into float16 is infinite, of which NumPy warns.
OVERFLOW = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
WIDE = pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])


@OVERFLOW
@WIDE
@pytest.mark.parametrize("num_tasks", range(1, 13))
def test_random_lists(num_tasks: int, wide: bool) -> None:
    count = 4 if num_tasks <= 8 else 1  # two groups take the interpreter several times as long
    check_list(random_list(num_tasks + 100 * wide, "cpu", num_tasks, count), num_tasks, "cpu", wide)


@OVERFLOW
@WIDE
@pytest.mark.parametrize("seed", range(5))
def test_several_chunks(seed: int, wide: bool) -> None:
    check_list(random_list(seed, "cpu", 2, 2, CHUNKS + SHAPES[:2]), 2, "cpu", wide)


@pytest.mark.parametrize(("num_tasks", "wide"), [(13, False), (64, True)])
def test_many_tasks(num_tasks: int, wide: bool) -> None:
    check_list(sized((5,), num_tasks, "cpu"), num_tasks, "cpu", wide)


@WIDE
def test_squares_beyond_float32(wide: bool) -> None:
    flat = extreme("cpu")
    check_list(flat, len(flat), "cpu", wide)


@OVERFLOW
@WIDE
@pytest.mark.parametrize("num_tasks", range(1, 8))
def test_against_projecting_the_gradients(num_tasks: int, wide: bool) -> None:
    check_public(sized((300, 41), num_tasks, "cpu"), num_tasks, "cpu", wide)
    check_public(random_list(num_tasks, "cpu", num_tasks, 2), num_tasks, "cpu", wide)


def test_one_rounding_direction() -> None:
    """Equal elements: every lane rounds alike, so that errors do not cancel."""
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = [torch.full((9000,), value) for value in (0.1, 1 / 3, 1.2345678)]
    with products(False):
        assert_gram(kernels.gram(flat, 3), flat, 3, False)


@pytest.mark.parametrize("options", every_option(), ids=str)
def test_options(options: tuple[object, ...]) -> None:
    check_weights(*crowded("cpu"), options)


def test_weights_of_unusual_arguments() -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    plain = (False, 1e-30, True, True, 1e-30, True)  # beyond float32's precision, and its range
    flat = sized((50,), 5, "cpu")
    flat[2] = torch.zeros(50)
    gram = reference.gram(flat, 5)
    order = random_order(5, "cpu")
    check_weights(gram, None, plain)
    check_weights(gram.t(), order.t().contiguous().t()[:, :4], plain)
    check_weights(gram * 1e60, order, plain)
    check_weights(gram * float("nan"), order, plain)
    for mine, same in zip(
        kernels.weights(gram, order.int(), *plain), kernels.weights(gram, order, *plain), strict=True
    ):
        assert torch.equal(mine, same)
    order[1, 2], order[3, 0] = 5, -1
    rows, coefficients = kernels.weights(gram, order, *plain)
    assert rows.isnan().all(1).tolist() == [False, True, False, True, False] and coefficients.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity less infinity, by NumPy
def test_what_is_missing_contributes_nothing() -> None:
    """No 0 times infinity where a gradient is None; infinity stays visible where it is not."""
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = [torch.tensor([1.0, float("inf")]), None, torch.ones(2), torch.ones(3), torch.ones(3), None]
    for wide in (False, True):
        with products(wide):
            found = kernels.gram(flat, 3)
        assert not found[0, 0].isfinite() and not found[0, 2].isfinite()
        assert found[0, 1] == 3 and found[1, 1] == 3 and found[1, 2] == 0 and found[2, 2] == 2
    first, second = kernels.combine(flat, 3, torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64))
    assert first.tolist() == [3.0, float("inf")] and second.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("at", [1, 65_536])
def test_an_infinite_product_of_a_tiny_element(at: int) -> None:
    """It stays infinite, with its sign, where elements come that are larger by more than float32's range."""
    from mtlkernels.ops.pcgrad import triton as kernels

    a, b = torch.zeros(70_000), torch.zeros(70_000)
    a[0], b[0] = -float("inf"), 1e-25
    a[at], b[at] = 1.0, 1e20
    for wide in (False, True):
        with products(wide):
            found = kernels.gram([a, b], 2)
        assert found[0, 0] == float("inf") and found[0, 1] == -float("inf")
        assert found[1, 1] == pytest.approx(1e40)


def test_coefficients_beyond_float32() -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = [torch.full((3,), 1e-40), torch.full((3,), 2.0), torch.full((3,), 1e-40), torch.full((3,), 1.0)]
    coefficients = torch.tensor([1e50, 0.0, -1e-50, 9.0], dtype=torch.float64)[::2]
    assert_combined(kernels.combine(flat, 2, coefficients), flat, 2, coefficients)


def test_nothing_to_do() -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = [torch.ones(0, 3), None]
    assert torch.equal(kernels.gram(flat, 2), torch.zeros(2, 2, dtype=torch.float64))
    assert kernels.combine(flat, 2, torch.ones(2, dtype=torch.float64))[0].shape == (0, 3)
