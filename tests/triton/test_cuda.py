"""Every kernel against the reference, compiled and on a GPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from mtlkernels import Routing, expert_mixture, hard_concrete, nn, snr_aver, snr_trans, use_backend  # noqa: E402
from mtlkernels.ops._triton_splits import Card  # noqa: E402
from mtlkernels.ops.level.spec import Groups  # noqa: E402
from mtlkernels.ops.level.triton import chain_backward  # noqa: E402
from tests import requires  # noqa: E402
from tests.triton import levels, norms, snr  # noqa: E402
from tests.triton.cases import Case, arguments, cases, check_backward, check_forward, check_gated_mixture, check_level  # noqa: E402
from tests.triton.recorded import agree, cotangents, noted  # noqa: E402

pytestmark = requires.cuda_gpu
SMALL = Case("small", 9, (8, 7, 6), activations=(3, 1), num_inputs=2)
# Rows, and widths past a tile in every direction, that take the interpreter too long.
LARGE = [
    Case("large_bf16", 8192, (416, 256, 128), 12, 3, (1, 1), dtype=torch.bfloat16, largest_gate=12),
    Case("large_f32", 4096, (416, 256, 128), 12, 3, (1, 1), largest_gate=12),
    Case("large_many_gates", 2000, (200, 264, 136), 12, 9, (3, 3), dtype=torch.float16, largest_gate=12),
]


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both settings of PyTorch's own switch, which the kernels follow."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if request.param else "ieee"
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("case", cases(scale=8) + LARGE, ids=str)
def test_chain(case: Case, tf32: bool) -> None:
    if tf32 and case.dtype != torch.float32:
        pytest.skip("TF32 concerns float32 alone")
    check_level(case, "cuda")


@pytest.mark.parametrize("width", [400, 256], ids=lambda width: f"ieee-aligned-{width}")
@pytest.mark.parametrize("linear", [False, True])
def test_tiles_of_wide_levels_on_few_rows(width: int, linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which read least with one multiprocessor; its name has the sanitizers take it, for which many rows take hours."""
    monkeypatch.setattr(chain_backward, "card", lambda _: Card(1, torch.cuda.get_device_capability()))
    case = Case("wide", 140, (width, 256, 16), 2, 2, (1, 2), dtype=torch.float16, largest_gate=2)
    check_level(case, "cuda", linear=linear)


@pytest.mark.parametrize("case", cases(scale=8) + LARGE, ids=str)
def test_gated_mixture(case: Case) -> None:
    check_gated_mixture(case, "cuda")


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4))[:-1], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool, bool]) -> None:
    check_level(SMALL, "cuda", needs=needs)


@pytest.mark.parametrize("case", levels.cases(scale=8) + LARGE, ids=str)
def test_chain_with_linear_gates(case: Case, tf32: bool) -> None:
    if tf32 and case.dtype != torch.float32:
        pytest.skip("TF32 concerns float32 alone")
    check_level(case, "cuda", linear=True)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=5))[:-1], ids=str)
def test_only_the_gradients_asked_for_with_linear_gates(needs: tuple[bool, ...]) -> None:
    check_level(levels.SMALL, "cuda", linear=True, needs=needs)


@pytest.mark.parametrize("name", norms.cases())
def test_layerwise(name: str, tf32: bool) -> None:
    norms.check(name, "cuda", scale=8)


@pytest.mark.parametrize("activation", ["prelu", "dice"])
@pytest.mark.parametrize("needs", [tuple(i == j for i in range(6)) for j in range(6)], ids=str)
def test_only_the_layerwise_gradients_asked_for(needs: tuple[bool, ...], activation: str) -> None:
    norms.check_gradients_asked_for(needs, activation, "cuda")


def test_running_statistics() -> None:
    norms.check_statistics("cuda")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("used", [(0,), (1, 2)], ids=str)
def test_part_of_a_chain(used: tuple[int, ...], linear: bool) -> None:
    a = arguments(LARGE[0], "cuda")
    level = a.level(linear)
    grads = [grad if k in used else None for k, grad in enumerate(a.grad_outputs)]
    check_backward(level, grads, check_forward(level), Groups(*[True] * 8), 1)


@pytest.mark.parametrize("linear", [False, True])
def test_losses_of_a_chain(linear: bool) -> None:
    a = arguments(LARGE[0], "cuda")
    level = a.level(linear)
    losses = ([0], [1, 2], [], [0, 2])
    grads = [grad if k in used else None for used in losses for k, grad in enumerate(a.grad_outputs)]
    check_backward(level, grads, check_forward(level), Groups(*[True] * 8), 1)


@pytest.mark.parametrize("name", snr.cases())
def test_snr(name: str, tf32: bool) -> None:
    snr.check(name, "cuda", scale=8)


def test_closed_routes_take_no_part() -> None:
    snr.check_closed_routes_take_no_part("cuda")


@pytest.mark.parametrize("linear", [False, True])
def test_results_are_the_same_every_time(linear: bool) -> None:
    from mtlkernels.ops.level import triton as kernels

    a = arguments(LARGE[0], "cuda")
    level = a.level(linear)

    def results() -> list[torch.Tensor]:
        outputs, saved = level.results(True, kernels.forward)
        return [*outputs, *kernels.backward(*level.backward(a.grad_outputs, saved, (True,) * 8))]

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)


def _training_step(linear: bool) -> tuple[torch.Tensor, Callable[[], list[torch.Tensor]]]:
    """The input of a small level, and a function that computes its gradients, called once so that all is compiled.

    ``linear``: its gates are linear layers.
    """
    routing = Routing.cgc(2, 2, 2, single_input=True)
    x = torch.randn(300, 64, device="cuda", requires_grad=True)
    weights = [torch.randn(6, 32, 64, device="cuda", requires_grad=True)]
    gates = torch.randn(*((8, 64) if linear else (300, 8)), device="cuda", requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        logits, layers = (None, gates) if linear else (gates, None)
        out = expert_mixture(x, weights, None, logits, routing, gate_weights=layers)
        return list(torch.autograd.grad([y.square().sum() for y in out], [x, *weights, gates]))

    gradients()
    return x, gradients


@pytest.mark.parametrize("linear", [False, True])
def test_nothing_waits_for_the_device(linear: bool) -> None:
    _, gradients = _training_step(linear)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_snr_does_not_wait_for_the_device() -> None:
    """Which routes are open is found out on the device; also of a loss that reads one output alone."""
    u = torch.randn(3, 300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(2, 3, 32, 64, device="cuda", requires_grad=True)
    log_alpha = torch.tensor([[4.0, -4.0, 4.0], [-4.0, 4.0, -4.0]], device="cuda", requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        z = hard_concrete(log_alpha)
        of_trans, of_aver = snr_trans(u, weight, z, closed_grad=False), snr_aver(u, z)
        alone = sum(out[1].square().sum() for out in (of_trans, of_aver))
        both = sum(v.square().sum() for v in (*of_trans, *of_aver))
        leaves = [u, weight, log_alpha]
        return [*torch.autograd.grad(alone, leaves, retain_graph=True), *torch.autograd.grad(both, leaves)]

    gradients()
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_at_a_time() -> None:
    """Counters and scratch of one call are not those of another that runs beside it."""
    _, gradients = _training_step(linear=True)
    expected, streams = gradients(), [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(gradients())
    torch.cuda.synchronize()
    for own in found:
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    x = torch.randn(300, 64)
    weight, logits = torch.randn(6, 32, 64), torch.randn(300, 8)
    routing = Routing.cgc(2, 2, 2, single_input=True)
    first, second = (
        expert_mixture(x.to(device), [weight.to(device)], None, logits.to(device), routing)
        for device in ("cuda:0", "cuda:1")
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("linear", [False, True])
def test_a_graph_can_be_captured_and_replayed(linear: bool) -> None:
    x, gradients = _training_step(linear)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        x.add_(1)
    graph.replay()
    torch.testing.assert_close(captured, gradients())


def _results(trunk: Any, batches: list[torch.Tensor], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Outputs and gradients of each batch, on two streams by turns."""
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    torch.manual_seed(1)
    for i, x in enumerate(batches):
        stream = streams[i % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            trunk.zero_grad()
            results = trunk(x.to(dtype))
            torch.autograd.backward(results, cotangents(results))
        torch.cuda.current_stream().wait_stream(stream)
        grads = [p.grad.clone() for p in trunk.parameters() if p.grad is not None]
        outputs = [y.detach().clone() for y in results]
        del results  # and with it the nodes that would accumulate on this stream what the next one computes
        yield [*outputs, *grads]


def _check_steps(model: torch.nn.Module, run: Any) -> None:
    """``run``, which may be the model itself, against the reference in float32 and in float64."""
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    batches = [torch.randn(64, 32, device="cuda") for _ in range(8)]
    found = list(_results(run, batches, torch.float32))
    with use_backend("reference"):
        expected = list(_results(plain, batches, torch.float32))
        exact = list(_results(wide, batches, torch.float64))
    for each in zip(found, expected, exact, strict=True):
        agree(*each)


@pytest.mark.parametrize("settings", [{}, {"batch_norm": True, "dropout": 0.2}], ids=["chain", "layerwise"])
def test_recorded_calls_with_other_inputs(settings: dict[str, Any]) -> None:
    """From the fifth call on all is replayed, on whatever stream."""
    torch.manual_seed(0)
    model = nn.PLE(in_features=32, num_tasks=2, expert_units=(48, 16), num_specific=2, num_shared=2, **settings).cuda()
    with noted() as replayed:
        _check_steps(model, model)
    assert replayed


# The captured pass holds the nodes that its parameters accumulate by, of the capture's stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_a_graphed_callable() -> None:
    """The way that README names for small batches: forward and backward of a trunk in a CUDA graph each."""
    torch.manual_seed(0)
    model = nn.PLE(in_features=32, num_tasks=2, expert_units=(48, 16), num_specific=2, num_shared=2).cuda()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (torch.randn(64, 32, device="cuda"),))
    _check_steps(model, graphed)


def test_batched_backward_passes() -> None:
    """Autograd runs them in threads of its own, which know of no batching."""
    torch.manual_seed(0)
    trunk = nn.MMoE(8, 3, (7, 6), num_experts=4).cuda()
    losses = torch.stack([y.square().sum() for y in trunk(torch.randn(9, 8, device="cuda"))])
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    leaves = list(trunk.parameters())
    found = torch.autograd.grad(losses, leaves, torch.eye(3, device="cuda"), is_grads_batched=True, **options)
    expected = [torch.autograd.grad(loss, leaves, **options) for loss in losses]
    torch.testing.assert_close(list(found), [torch.stack(own) for own in zip(*expected, strict=True)])
