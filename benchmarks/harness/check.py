"""Correctness before speed: a contender that computes something else is not timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# How many times the baseline's own rounding error a contender may make.
ALLOWANCE = 3.0
# Added for what depends on luck and not on care: the last rounding to the dtype, in units of its epsilon, and the order
# in which thousands of rows are summed, in units of float32's (torch.compile sums biases' gradients row by row where
# eager PyTorch sums pairwise, and is up to 12 times less exact there).
ROUNDING, SUMMATION = 0.5, 32.0
# What the baseline itself may be off, in units of the dtype's epsilon: a guard against a wrong float64 evaluation, not
# a measure of quality. Single elements stray further than the root mean square.
BASELINE_LIMIT = {"rms": 32.0, "max": 256.0}


@dataclass(frozen=True)
class Error:
    """Distance of a tensor from its float64 value, as a share of that value's own size."""

    rms: float
    max: float


@dataclass(frozen=True)
class Verdict:
    """Whether a contender may be timed.

    ``error`` is the largest over all tensors of the error divided by what was allowed: at most 1 when ``ok``.
    ``reason`` says what was wrong.
    """

    ok: bool
    error: float
    reason: str = ""


def measure(got: Tensor, expected: Tensor) -> Error:
    """The error of ``got`` in root mean square and in its worst element; infinite where it is not finite."""
    difference = got.detach().to(expected.device, torch.float64) - expected
    if difference.numel() == 0:
        return Error(0.0, 0.0)
    if not bool(torch.isfinite(difference).all()):
        return Error(float("inf"), float("inf"))
    scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)
    rms_scale = max(float(expected.square().mean().sqrt()), torch.finfo(torch.float64).tiny)
    return Error(float(difference.square().mean().sqrt()) / rms_scale, float(difference.abs().max()) / scale)


def measure_all(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Error]:
    """The error of every expected tensor.

    Raises:
        ValueError: a tensor is missing, is one too many, or has another shape.
    """
    if results.keys() != expected.keys():
        raise ValueError(f"results must be {sorted(expected)}, got {sorted(results)}")
    for name, tensor in results.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} must have shape {list(expected[name].shape)}, got {list(tensor.shape)}")
    return {name: measure(results[name], expected[name]) for name in expected}


def judge_baseline(errors: Mapping[str, Error], dtype: torch.dtype, slack: float = 1.0) -> Verdict:
    """The baseline sets the budget of the others, so its own errors are held against the dtype's epsilon."""
    eps = slack * torch.finfo(dtype).eps
    limits = {name: Error(BASELINE_LIMIT["rms"] * eps, BASELINE_LIMIT["max"] * eps) for name in errors}
    return _judge(errors, limits)


def judge(
    errors: Mapping[str, Error], baseline: Mapping[str, Error], dtype: torch.dtype, slack: float = 1.0
) -> Verdict:
    """At most :data:`ALLOWANCE` times the baseline's error, tensor by tensor, plus a small floor."""
    floor = slack * (ROUNDING * torch.finfo(dtype).eps + SUMMATION * torch.finfo(torch.float32).eps)
    limits = {
        name: Error(ALLOWANCE * error.rms + floor, ALLOWANCE * error.max + floor) for name, error in baseline.items()
    }
    return _judge(errors, limits)


def _judge(errors: Mapping[str, Error], limits: Mapping[str, Error]) -> Verdict:
    ratios = {name: max(error.rms / limits[name].rms, error.max / limits[name].max) for name, error in errors.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    if ratios[worst] <= 1.0:
        return Verdict(True, ratios[worst])
    error, limit = errors[worst], limits[worst]
    return Verdict(
        False,
        ratios[worst],
        f"{worst} is off by {error.rms:.2e} (rms) and {error.max:.2e} (max) of its size,"
        f" allowed are {limit.rms:.2e} and {limit.max:.2e}",
    )
