"""PCGrad's CUDA C++ kernels on a GPU, against float64; tests/csrc runs them on an emulated device."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _backends
from mtlkernels.ops.pcgrad import cuda, reference
from mtlkernels.testing import random_task_gradients
from tests import requires
from tests.ops.pcgrad.definition import EXACT, assert_agrees

pytestmark = [requires.cuda_gpu, requires.cuda_kernels]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _by_cuda() -> Iterator[None]:
    with mk.use_backend("cuda"):
        yield


def gradients(tasks: int, sizes: list[int], dtype: torch.dtype = torch.float32) -> list[list[Tensor | None]]:
    return [[torch.randn(size, device=DEVICE).to(dtype) for size in sizes] for _ in range(tasks)]


def flat(grads: list[list[Tensor | None]]) -> list[Tensor | None]:
    return [grad for column in zip(*grads, strict=True) for grad in column]


def permutations(tasks: int) -> Tensor:
    return torch.stack([torch.randperm(tasks) for _ in range(tasks)]).to(DEVICE)


def relative_error(found: Tensor, exact: Tensor) -> float:
    norms = exact.diagonal().sqrt()
    return float(((found - exact).abs() / (norms.unsqueeze(1) * norms)).max())


def test_it_is_the_first_choice() -> None:
    assert mk.backends()["pcgrad"]["cuda"][0] == "cuda"


@pytest.mark.parametrize("seed", range(100))
def test_random_lists(seed: int) -> None:
    case = random_task_gradients(seed, device=DEVICE)
    rng = random.Random(seed)
    options = {
        "reduction": rng.choice(("sum", "mean")),
        "include_self": rng.random() < 0.5,
        "normalize": rng.random() < 0.2,
        "project": rng.random() < 0.8,
    }
    assert_agrees(case.grads, case.order, EXACT, **options)


@pytest.mark.parametrize("tasks", range(1, 65))
def test_every_number_of_tasks(tasks: int, dtype: torch.dtype) -> None:
    grads = gradients(tasks, [1, 5000, 0, 12_345], dtype)
    found = mk.gram(grads)
    assert torch.equal(found, found.T)
    assert relative_error(found, reference.gram(flat(grads), tasks)) < 1e-12
    order = permutations(tasks)
    options = (False, None, False, True, 0.0, True)
    rows, coefficients = cuda.weights(found, order, *options)
    torch.testing.assert_close((rows, coefficients), reference.weights(found, order, *options), rtol=1e-9, atol=1e-12)
    for got, want in zip(
        cuda.combine(flat(grads), tasks, coefficients), reference.combine(flat(grads), tasks, coefficients), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("offset", [0, 1])
def test_unaligned_and_many_parameters(offset: int) -> None:
    sizes = [17] * 5000 + [100_003]
    grads = [[torch.randn(size + offset, device=DEVICE)[offset:] for size in sizes] for _ in range(3)]
    exact = reference.gram(flat(grads), 3)
    assert relative_error(mk.gram(grads), exact) < 1e-12
    coefficients = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64, device=DEVICE)
    found = cuda.combine(flat(grads), 3, coefficients)
    torch.testing.assert_close(found, reference.combine(flat(grads), 3, coefficients))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_twenty_million_parameters(scale: float) -> None:
    grads = gradients(4, [500_000] * 40)
    grads = [[grad * scale for grad in row if grad is not None] for row in grads]
    exact = reference.gram(flat(grads), 4)
    assert torch.isfinite(exact).all() and (exact.diagonal() > 0).all()
    assert relative_error(mk.gram(grads), exact) < 1e-12


@pytest.mark.slow
def test_a_parameter_past_32_bits() -> None:
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 16 * size:
        pytest.skip("takes 34 GB of device memory")
    grads: list[Tensor | None] = [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for grad, value in zip(grads, (2.0, -3.0), strict=True):
        grad[-5:] = value  # type: ignore[index]
    assert cuda.gram(grads, 2).tolist() == [[20.0, -30.0], [-30.0, 45.0]]
    coefficients = torch.tensor([1.0, 2.0], dtype=torch.float64, device=DEVICE)
    (found,) = cuda.combine(grads, 2, coefficients)
    assert found[-5:].tolist() == [-4.0] * 5 and not found[:-5].any()


def test_the_bits_are_the_same_every_time() -> None:
    grads = gradients(8, [1_000_001, 3, 250_000])
    order = permutations(8)
    first, result = mk.gram(grads), mk.pcgrad(grads, order=order)
    for _ in range(20):
        assert torch.equal(mk.gram(grads), first)
        again = mk.pcgrad(grads, order=order)
        assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))


def test_what_is_not_finite_stays_visible() -> None:
    grads = gradients(3, [1000, 1000])
    grads[1][0][7] = torch.inf  # type: ignore[index]
    grads[2][0] = None
    torch.testing.assert_close(mk.gram(grads), reference.gram(flat(grads), 3), rtol=1e-12, atol=1e-9, equal_nan=True)
    assert any(not torch.isfinite(result).all() for result in mk.pcgrad(grads))


def test_nothing_waits_for_the_device() -> None:
    grads = gradients(8, [5000] * 2000)  # a table too large to be staged
    mk.pcgrad(grads)
    try:
        torch.cuda.set_sync_debug_mode("error")
        mk.pcgrad(grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_can_be_captured_and_replayed() -> None:
    grads = gradients(5, [100_000, 7, 300_001])
    order = permutations(5)
    mk.pcgrad(grads, order=order)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mk.pcgrad(grads, order=order)
    for _ in range(3):  # the blocks' counters start from zero each time
        for row in grads:
            for grad in row:
                grad.normal_()  # type: ignore[union-attr]
        graph.replay()
        expected = mk.pcgrad(grads, order=order)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_two_streams_at_a_time() -> None:
    cases = [gradients(4, [400_000, 50_000]) for _ in range(2)]
    order = permutations(4)
    expected = [mk.pcgrad(grads, order=order) for grads in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(10):
        found = []
        for stream, grads in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                found.append(mk.pcgrad(grads, order=order))
        torch.cuda.synchronize()
        for results, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


def test_more_tasks_than_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients(65, [10])
    with pytest.raises(RuntimeError, match="takes at most 64 tasks, got 65"):
        mk.gram(grads)
    monkeypatch.setattr(_backends, "_forced", None)  # the dispatcher's own choice takes them
    assert relative_error(mk.gram(grads), reference.gram(flat(grads), 65)) < 1e-6
