"""pytest-benchmark cases of single ops: ``pytest benchmarks --benchmark-only``.

For watching one op while working on it; ``benchmarks/run.py`` is what compares with other people's code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.peers import task_gradients

ROWS, WIDTH, UNITS = 1024, 128, (128, 64)
PARAMETERS = 1_000_000
ROUTING = mk.Routing.cgc(2, 4, 4, shared_gate=True, single_input=True)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16]

Benchmark = Callable[..., Any]


def implementations(op: str) -> list[Any]:
    """Every implementation of this install, by device and name."""
    found = mk.backends()[op]
    return [pytest.param(device, name, id=f"{device}-{name}") for device in DEVICES for name in found[device]]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    yield request.param


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    scale = float(shape[-1]) ** -0.5
    made: Tensor = scale * torch.randn(shape)
    return made.to(device, dtype)


def measure(
    benchmark: Benchmark, name: str, call: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], training: bool
) -> None:
    """Times a call, and with ``training`` its backward as well."""

    def step() -> None:
        with torch.set_grad_enabled(training):
            outputs = call()
        if training:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        if leaves[0].is_cuda:
            torch.cuda.synchronize()

    for leaf in leaves:
        leaf.requires_grad_(training)
    with mk.use_backend(name):
        step()
        benchmark(step)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("device", "name"), implementations("gated_mixture"))
def test_gated_mixture(benchmark: Benchmark, device: str, name: str, dtype: torch.dtype, training: bool) -> None:
    experts = random(device, dtype, ROWS, ROUTING.num_experts, UNITS[-1])
    logits = [random(device, dtype, ROWS, len(gate)) for gate in ROUTING.gate_experts]
    measure(benchmark, name, lambda: mk.gated_mixture(experts, logits, ROUTING), [experts, *logits], training)


def level(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Input, weights and biases of experts with two layers."""
    widths = (WIDTH, *UNITS)
    experts = range(ROUTING.num_experts)
    weights = [[random(device, dtype, n, m) for _ in experts] for m, n in zip(widths, UNITS, strict=False)]
    return random(device, dtype, ROWS, WIDTH), weights, [[random(device, dtype, n) for _ in experts] for n in UNITS]


def leaves_of(x: Tensor, *layers: Any) -> list[Tensor]:
    return [x, *(tensor for group in layers for layer in group for tensor in layer)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("device", "name"), implementations("expert_mixture"))
def test_expert_mixture(benchmark: Benchmark, device: str, name: str, dtype: torch.dtype, training: bool) -> None:
    x, weights, biases = level(device, dtype)
    logits = [random(device, dtype, ROWS, len(gate)) for gate in ROUTING.gate_experts]
    leaves = [*leaves_of(x, weights, biases), *logits]
    measure(benchmark, name, lambda: mk.expert_mixture(x, weights, biases, logits, ROUTING), leaves, training)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("device", "name"), implementations("expert_mixture"))
def test_expert_mixture_with_gate_layers(benchmark: Benchmark, device: str, name: str, dtype: torch.dtype, training: bool) -> None:
    x, weights, biases = level(device, dtype)
    gates = [random(device, dtype, len(gate), WIDTH) for gate in ROUTING.gate_experts]
    leaves = [*leaves_of(x, weights, biases), *gates]
    call = functools.partial(mk.expert_mixture, x, weights, biases, None, ROUTING, gate_weights=gates)
    measure(benchmark, name, call, leaves, training)


@pytest.mark.parametrize("activation", ["relu", "prelu", "dice"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("device", "name"), implementations("expert_mixture"))
def test_expert_mixture_with_norms(
    benchmark: Benchmark, device: str, name: str, dtype: torch.dtype, training: bool, activation: str
) -> None:
    x, weights, biases = level(device, dtype)
    logits = [random(device, dtype, ROWS, len(gate)) for gate in ROUTING.gate_experts]
    norms = [[torch.nn.BatchNorm1d(n, device=device) for _ in range(ROUTING.num_experts)] for n in UNITS]
    slopes = None if activation == "relu" else [[random(device, dtype, 1) for _ in layer] for layer in norms]
    leaves = [*leaves_of(x, weights, biases, slopes or ()), *logits]
    options = {"activation": activation, "norms": norms, "slopes": slopes}
    call = functools.partial(mk.expert_mixture, x, weights, biases, logits, ROUTING, **options)
    measure(benchmark, name, call, leaves, training)


@pytest.mark.parametrize("tensors", [4, 40])
@pytest.mark.parametrize("num_tasks", [2, 8])
@pytest.mark.parametrize(("device", "name"), implementations("pcgrad"))
def test_pcgrad(benchmark: Benchmark, device: str, name: str, dtype: torch.dtype, num_tasks: int, tensors: int) -> None:
    lengths = task_gradients.sizes(PARAMETERS, tensors)
    order = task_gradients.orders(num_tasks)
    grads = task_gradients.dense(num_tasks, lengths, order, dtype, torch.device(device))
    rows = torch.tensor(order, device=device)

    def step() -> None:
        mk.pcgrad(grads, order=rows)
        if device == "cuda":
            torch.cuda.synchronize()

    with mk.use_backend(name):
        step()
        benchmark(step)
