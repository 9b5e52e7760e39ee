"""Lists of gradients for PCGrad's Triton kernels, and how results are checked; for the interpreter and GPUs alike."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mtlkernels.ops.pcgrad import reference
from mtlkernels.testing import DTYPES, laid_out
from tests.triton.cases import poisoned

# Around a vector of lanes and a step of the kernels, and far from them; CHUNKS around a chunk.
SHAPES = ((0,), (1,), (7,), (129,), (513,), (33, 5), (3, 4, 5, 2))
CHUNKS = ((3071,), (3072,), (3073,), (4097,), (91, 91))
LAYOUTS = ("contiguous", "transposed", "strided", "offset")
Flat = list[Tensor | None]


@contextmanager
def products(wide: bool) -> Iterator[None]:
    """Products in float64, or in float32 but for gradients in float64, as a GPU's kind would decide."""
    from mtlkernels.ops.pcgrad import triton as kernels

    with mock.patch.object(kernels, "is_wide", lambda dtype, device: wide or dtype == torch.float64):
        yield


def random_list(
    seed: int, device: str, num_tasks: int, num_parameters: int, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Flat:
    """Gradients for parameters of any dtype: None, zero, of any scale and layout."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    flat: Flat = []
    for _ in range(num_parameters):
        shape, dtype = rng.choice(shapes), rng.choice(DTYPES)
        exponents = (-3, 2) if dtype == torch.float16 else (-12, 8)
        layouts = [rng.choice(LAYOUTS)] if rng.random() < 0.5 else LAYOUTS  # often all tasks' alike
        column: Flat = []
        for _ in range(num_tasks):
            kind = rng.random()
            scale = 0.0 if kind < 0.1 else 10.0 ** rng.uniform(*exponents)
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            column.append(None if kind > 0.85 else laid_out(value.to(dtype).to(device), rng.choice(layouts)))
        if all(grad is None for grad in column):
            column[0] = torch.ones(shape, dtype=dtype, device=device)
        flat += column
    return flat


def sized(sizes: Sequence[int], num_tasks: int, device: str, dtype: torch.dtype = torch.float32) -> Flat:
    """Normal gradients of these sizes, the tasks' alike enough for all kinds of angles."""
    generator = torch.Generator(device).manual_seed(sum(sizes))
    flat: Flat = []
    for size in sizes:
        common = torch.randn(size, generator=generator, device=device)
        noise = (torch.randn(size, generator=generator, device=device) for _ in range(num_tasks))
        flat += [(n + (t % 3 - 1) * common).to(dtype) for t, n in enumerate(noise)]
    return flat


def random_order(num_tasks: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tasks, num_tasks, generator=generator).argsort(1).to(device)


def assert_gram(found: Tensor, flat: Flat, num_tasks: int, wide: bool) -> None:
    """Every element is that of float64, to a part of the two norms."""
    true = reference.gram([None if grad is None else grad.double() for grad in flat], num_tasks)
    assert found.shape == true.shape and found.dtype == torch.float64
    assert torch.equal(found, found.t()), "not symmetric"
    norms = true.diagonal().sqrt()
    error = (found - true).abs() / (norms.unsqueeze(1) * norms).clamp_min(1e-300)
    # What is held to be true is a float64 sum too, whose order, so its rounding, depends on the processor.
    exact = 128 * torch.finfo(torch.float64).eps
    allowed = exact if wide or all(grad is None or grad.dtype == torch.float64 for grad in flat) else 5e-7
    assert error.max() <= allowed, f"relative error {error.max():.3g}, allowed {allowed:.3g}"


def assert_combined(found: Sequence[Tensor], flat: Flat, num_tasks: int, coefficients: Tensor) -> None:
    """Dtype, strides and, to a rounding of that dtype, values are those of the sum in float64."""
    expected = reference.combine(flat, num_tasks, coefficients)
    assert len(found) == len(expected)
    for p, (mine, same, column) in enumerate(zip(found, expected, columns(flat, num_tasks), strict=True)):
        assert (mine.dtype, mine.shape, mine.stride()) == (same.dtype, same.shape, same.stride()), f"parameter {p}"
        terms = [c * grad.double() for c, grad in zip(coefficients, column, strict=True) if grad is not None]
        true, size = sum(terms), sum(term.abs() for term in terms)
        limits = torch.finfo(mine.dtype)
        allowed = limits.eps * true.abs() + 1e-14 * size + limits.smallest_normal * limits.eps
        overflow = true.abs() > limits.max
        wrong = torch.where(overflow, ~mine.isinf(), ~((mine.double() - true).abs() <= allowed))
        assert not wrong.any(), f"parameter {p}: {mine[wrong][:4]}, expected {true[wrong][:4]}"


def check_list(flat: Flat, num_tasks: int, device: str, wide: bool) -> None:
    """All three operators, each on what is known to be right."""
    from mtlkernels.ops.pcgrad import triton as kernels

    with products(wide), poisoned():
        found = kernels.gram(flat, num_tasks)
    assert_gram(found, flat, num_tasks, wide)
    options = (False, None, False, True, 0.0, False)
    order = random_order(num_tasks, device)
    check_weights(reference.gram(flat, num_tasks), order, options)
    coefficients = reference.weights(reference.gram(flat, num_tasks), order, *options)[1]
    with poisoned():
        results = kernels.combine(flat, num_tasks, coefficients)
    assert_combined(results, flat, num_tasks, coefficients)


def check_weights(gram: Tensor, order: Tensor | None, options: tuple[Any, ...]) -> None:
    """The projections on T x T coefficients, as the reference does them."""
    from mtlkernels.ops.pcgrad import triton as kernels

    with poisoned():
        found = kernels.weights(gram, order, *options)
    assert_weights(found, gram, order, options)


def assert_weights(found: tuple[Tensor, Tensor], gram: Tensor, order: Tensor | None, options: tuple[Any, ...]) -> None:
    """Coefficients of the projected gradients, and their sums or means.

    A projection applies or not by the sign of an inner product. Where its terms cancel, so that nothing but their
    roundings is left, the order of a sum decides, and a coefficient may be another one altogether. What is added to
    the gradient then is no more than these roundings are, which is what such coefficients are held against.
    """
    (rows, total), wanted = found, reference.weights(gram, order, *options)[0]
    assert all(mine.is_contiguous() and mine.dtype == torch.float64 for mine in found)
    norms = gram.diagonal().sqrt()
    size = torch.where(wanted == 0, 0, wanted.abs() * norms).sum(1, keepdim=True)
    error = (rows - wanted).abs()
    close = torch.where(is_clear(gram, order, options), error <= 1e-9 * wanted.abs(), error * norms <= 1e-13 * size)
    right = close | (rows == wanted) | (rows.isnan() & wanted.isnan())
    assert right.all(), f"{rows[~right][:4]}, expected {wanted[~right][:4]}"
    summed, terms = (rows.mean(0), rows.abs().mean(0)) if options[-1] else (rows.sum(0), rows.abs().sum(0))
    right = ((total - summed).abs() <= 1e-13 * terms) | (total.isnan() & summed.isnan())
    assert right.all(), f"{total[~right][:4]}, expected {summed[~right][:4]}"


def is_clear(gram: Tensor, order: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    """Which coefficients [T, T] stay what they are where every inner product is off by some roundings."""
    generator = torch.Generator().manual_seed(0)
    wanted = reference.weights(gram, order, *options)[0]
    clear = torch.ones_like(wanted, dtype=torch.bool)
    for _ in range(16):
        noise = torch.rand(gram.shape, generator=generator, dtype=torch.float64).to(gram.device) - 0.5
        found = reference.weights(gram * (1 + 2**-48 * (noise + noise.T)), order, *options)[0]
        clear &= (found - wanted).abs() <= 1e-11 * wanted.abs()
    return clear


def every_option() -> list[tuple[Any, ...]]:
    """Combinations of include_self, max_norm, normalize, project, eps and mean."""
    return list(itertools.product((False, True), (None, 0.7), (False, True), (True, False), (0.0, 0.3), (False, True)))


def check_public(flat: Flat, num_tasks: int, device: str, wide: bool, **options: Any) -> None:
    """``pcgrad`` by the Triton kernels against projecting the gradients themselves, in float64."""
    import mtlkernels as mk

    order = random_order(num_tasks, device, 1)
    tasks = [flat[t::num_tasks] for t in range(num_tasks)]
    with mk.use_backend("triton"), products(wide), poisoned():
        found = mk.pcgrad(tasks, order=order, **options)
    like = [next(grad for grad in column if grad is not None) for column in columns(flat, num_tasks)]
    whole = [
        torch.cat([torch.zeros_like(z).double().flatten() if g is None else g.double().flatten() for g, z in pairs])
        for pairs in (list(zip(task, like, strict=True)) for task in tasks)
    ]
    true = projected(whole, order.tolist())
    size = sum(grad.norm() for grad in whole)
    for mine, wanted in zip(found, true.split([z.numel() for z in like]), strict=True):
        error = (mine.double().flatten() - wanted).norm()
        allowed = torch.finfo(mine.dtype).eps * wanted.norm() + (1e-13 if wide else 1e-5) * size
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def projected(grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> Tensor:
    """The sum of the projected gradients, by the paper's algorithm 1."""
    total = torch.zeros_like(grads[0])
    for i, row in enumerate(order):
        mine = grads[i]
        for j in row:
            inner, square = mine @ grads[j], grads[j] @ grads[j]
            if j != i and inner < 0 and square > 0:
                mine = mine - inner / square * grads[j]
        total += mine
    return total


def columns(flat: Flat, num_tasks: int) -> list[Flat]:
    """The gradients parameter by parameter."""
    return [flat[start : start + num_tasks] for start in range(0, len(flat), num_tasks)]


def crowded(device: str) -> tuple[Tensor, Tensor]:
    """The Gram matrix of 8 gradients in a plane, and an order in which one comes to conflict with itself."""
    generator = torch.Generator().manual_seed(205)
    plane = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    gram, order = plane @ plane.T, torch.rand(8, 8, generator=generator).argsort(1)
    alone, itself = (reference.weights(gram, order, flag, None, False, True, 0.0, False)[1] for flag in (False, True))
    assert not torch.allclose(alone, itself), "no gradient conflicts with itself"
    return gram.to(device), order.to(device)


def extreme(device: str) -> Flat:
    """Squares beyond float32's range on both sides, and every order of small and large elements in one lane."""
    generator = torch.Generator().manual_seed(0)
    size = 2100
    steps = torch.arange(size) // 512  # a lane's steps
    rising, falling = 10.0 ** (15.0 * steps - 30), 10.0 ** (30 - 15.0 * steps)
    scales = [1e-25, 1e25, 1.0, 1e-40, 3e38, rising, falling, 10.0 ** (20.0 * (torch.arange(size) % 2) - 10)]
    return [(torch.rand(size, generator=generator).sub(0.45) * scale).float().to(device) for scale in scales]
