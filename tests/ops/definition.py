"""The ops by their formulas, term by term, independent of the package: what its references are tested against."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, assert_within_budget, evaluate, poisoned_outputs

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: x.clamp(min=0) + 0.01 * x.clamp(max=0),
    "gelu": lambda x: x * 0.5 * (1 + (x / math.sqrt(2)).erf()),
    "silu": lambda x: x * (1 / (1 + (-x).exp())),
    "tanh": lambda x: 2 / (1 + (-2 * x).exp()) - 1,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


# The slope below zero of the activations that have a kink there.
KINKED = {"relu": 0.0, "leaky_relu": 0.01}


def with_noise_at_kink(name: str, noise: float) -> Callable[[Tensor], Tensor]:
    """The activation; its derivative's sign is taken from an input with noise of so many root mean squares."""

    def activate(x: Tensor) -> Tensor:
        noisy = x.detach() + noise * x.detach().square().mean().sqrt() * torch.randn_like(x)
        slope = torch.where(noisy > 0, torch.ones_like(x), KINKED[name]).detach()
        return ACTIVATIONS[name](x).detach() + slope * (x - x.detach())

    return activate


def _logits_by_gate(gate_logits: Any, routing: Any) -> list[Tensor]:
    if not isinstance(gate_logits, Tensor):
        return list(gate_logits)
    logits, at = [], 0
    for gate in routing.gate_experts:
        logits.append(gate_logits[:, at : at + len(gate)])
        at += len(gate)
    return logits


def mix(experts: Sequence[Tensor], gate_logits: Any, routing: Any) -> list[Tensor]:
    outputs = []
    for gate, logits in zip(routing.gate_experts, _logits_by_gate(gate_logits, routing), strict=True):
        exponentials = [column.exp() for column in logits.unbind(1)]
        total = sum(exponentials)
        terms = [(value / total)[:, None] * experts[e] for e, value in zip(gate, exponentials, strict=True)]
        outputs.append(sum(terms))
    return outputs


def gated_mixture(experts: Tensor, gate_logits: Any, routing: Any) -> list[Tensor]:
    """y_k = sum over e in gate k of exp(l_ke) / sum_j exp(l_kj) * experts_e."""
    return [y.to(experts.dtype) for y in mix(experts.unbind(1), gate_logits, routing)]


def expert_mixture(
    inputs: Any,
    weights: Any,
    biases: Any,
    gate_logits: Any,
    routing: Any,
    *,
    activation: Any = "relu",
    kink_noise: float = 0.0,
) -> list[Tensor]:
    """Every expert by itself, x <- activation(x W^T + b) a layer, then the mixture."""
    names = [activation] * len(weights) if isinstance(activation, str) else activation
    noisy = KINKED if kink_noise else {}
    activations = [with_noise_at_kink(name, kink_noise) if name in noisy else ACTIVATIONS[name] for name in names]
    outputs = []
    for e, stream in enumerate(routing.expert_inputs):
        x = inputs if isinstance(inputs, Tensor) else inputs[stream]
        for layer, activate in enumerate(activations):
            x = x @ weights[layer][e].transpose(0, 1)
            if biases is not None and biases[layer] is not None:
                x = x + biases[layer][e]
            x = activate(x)
        outputs.append(x)
    return [y.to(outputs[0].dtype) for y in mix(outputs, gate_logits, routing)]


def snr_trans(u: Any, weight: Any, z: Tensor, *, closed_grad: bool = True) -> list[Tensor]:
    """v_i = sum_j z_ij W_ij u_j."""
    return [sum(z[i, j] * (x @ row[j].transpose(0, 1)) for j, x in enumerate(u)) for i, row in enumerate(weight)]


def snr_aver(u: Any, z: Tensor, *, closed_grad: bool = True) -> list[Tensor]:
    """v_i = sum_j z_ij u_j."""
    return [sum(value * x for value, x in zip(row, u, strict=True)) for row in z.unbind(0)]


def kink_slack(
    case: Case, exact: dict[str, list[Tensor]], formulas: Callable[..., Any] = expert_mixture
) -> dict[str, list[Tensor]]:
    """How far gradients move when units within rounding distance of a kink fall on either side of it, at random.

    Two correct implementations may round such a unit's input to different sides of zero.
    """
    wide = case.to(torch.float64)
    noisy = functools.partial(formulas, kink_noise=4 * torch.finfo(case.dtype).eps)
    slack = {name: [torch.zeros_like(t) for t in group] for name, group in exact.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(8):
            moved = evaluate(noisy, wide, allow_unused=True)
            for name, group in slack.items():
                for total, a, b in zip(group, moved[name], exact[name], strict=True):
                    total += (a - b).abs()
    return slack


def assert_agrees(
    op: Callable[..., Any],
    case: Case,
    baseline: Callable[..., Any] | None = None,
    threads: int = 1,
    formulas: Callable[..., Any] | None = None,
    factor: float = 3.0,
) -> None:
    """An op's outputs and gradients against the definition in float64.

    Args:
        op: the public function, in the block of the implementation under test.
        case: its arguments.
        baseline: PyTorch in the dtype of the case; by default the definition itself.
        threads: how many the op gets.
        formulas: the definition; by default the one in this module that has the op's name.
        factor: how many times the baseline's error is allowed.
    """
    formulas = formulas or globals()[op.__name__]
    exact = evaluate(formulas, case.to(torch.float64), allow_unused=True)
    usual = evaluate(baseline or formulas, case, allow_unused=True)
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with poisoned_outputs():
            actual = evaluate(op, case)
    finally:
        torch.set_num_threads(usual_threads)
    try:
        assert_within_budget(actual, exact, usual, factor=factor)
    except AssertionError:
        names = case.arguments.get("activation", ())
        if not {"prelu", *KINKED} & ({names} if isinstance(names, str) else set(names)):
            raise
        assert_within_budget(actual, exact, usual, factor=factor, slack=kink_slack(case, exact, formulas))


def reference_op(op: Callable[..., Any], **arguments: Any) -> Any:
    """The op by its reference implementation, whatever the block around asks for."""
    with mk.use_backend("reference"):
        return op(**arguments)


def pcgrad(
    grads: Sequence[Sequence[Tensor | None]],
    order: Sequence[Sequence[int]],
    *,
    reduction: str = "sum",
    include_self: bool = False,
    max_norm: float | None = None,
    normalize: bool = False,
    project: bool = True,
    eps: float = 0.0,
) -> list[Tensor | None]:
    """Gradient surgery by walking over whole gradients, in float64."""
    shapes = [next((g for g in column if g is not None), None) for column in zip(*grads, strict=True)]

    def flatten(row: Sequence[Tensor | None]) -> Tensor:
        parts = [
            (torch.zeros_like(like) if grad is None else grad).double().to_dense().flatten()
            for grad, like in zip(row, shapes, strict=True)
            if like is not None
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    tasks = [flatten(row) for row in grads]
    if max_norm is not None:
        tasks = [g * (max_norm / g.norm()) if g.norm() > max_norm else g for g in tasks]
    if normalize:
        mean = sum(g.norm() for g in tasks) / len(tasks)
        tasks = [g * (mean / g.norm()) if g.norm() > 0 else g for g in tasks]
    total = torch.zeros_like(tasks[0])
    for i, own in enumerate(tasks):
        projected = own.clone()
        for j in order[i] if project else ():
            if (j == i and not include_self) or not tasks[j].any():
                continue
            inner = projected @ tasks[j]
            if inner < 0:
                projected -= inner / (tasks[j] @ tasks[j] + eps) * tasks[j]
        total += projected
    if reduction == "mean":
        total = total / len(tasks)
    found, at = [], 0
    for like in shapes:
        if like is None:
            found.append(None)
            continue
        found.append(total[at : at + like.numel()].reshape(like.shape))
        at += like.numel()
    return found


def assert_pcgrad_agrees(grads: Sequence[Sequence[Tensor | None]], order: Tensor, **options: Any) -> None:
    """mk.pcgrad against the definition."""
    with poisoned_outputs():
        actual = mk.pcgrad(grads, order=order, **options)
    assert_pcgrad_result(actual, grads, order, **options)


def assert_pcgrad_result(
    actual: Sequence[Tensor | None], grads: Sequence[Sequence[Tensor | None]], order: Tensor, **options: Any
) -> None:
    """A result against the definition: an error of one rounding to the dtype, and of float64 sums of all tasks."""
    expected = pcgrad(grads, order.tolist(), **options)
    assert len(actual) == len(expected)
    sizes = [float(sum(g.double().to_dense().square().sum() for g in row if g is not None)) ** 0.5 for row in grads]
    for got, want, column in zip(actual, expected, zip(*grads, strict=True), strict=True):
        if want is None:
            assert got is None
            continue
        like = next(grad for grad in column if grad is not None)
        assert got.dtype == like.dtype and got.shape == like.shape and got.device == like.device
        rounding = torch.finfo(like.dtype).eps * want.abs() + torch.finfo(like.dtype).tiny
        error = (got.to_dense().double().cpu() - want.cpu()).abs()
        excess = error - rounding.cpu() - 1e-13 * len(sizes) * max(sizes)
        assert not excess.numel() or float(excess.max()) <= 0, f"error {float(error.max()):.3g} in {like.dtype}"
