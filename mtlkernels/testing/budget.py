"""How far results may be from float64: the error budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Allowed beside a multiple of PyTorch's own error, relative to the largest value of a group: an implementation may
# round twice where PyTorch was lucky, and add up in another order in the dtype that sums are accumulated in.
ROUNDINGS = 2.0
ACCUMULATION_ULPS = 16.0
# A float64 definition is exact to this many units in the last place of the largest value of the whole case.
DEFINITION_ULPS = 64.0


def over_budget(
    actual: Mapping[str, Sequence[Tensor]],
    exact: Mapping[str, Sequence[Tensor]],
    baseline: Mapping[str, Sequence[Tensor]],
    *,
    factor: float = 3.0,
    slack: Mapping[str, Sequence[Tensor]] | None = None,
) -> str | None:
    """What is wrong with results, None where nothing is; see :func:`assert_within_budget`."""
    if not actual.keys() == exact.keys() == baseline.keys():
        return f"results are of {list(actual)}, expected {list(exact)}"
    largest = max((float(t.abs().max()) for group in exact.values() for t in group if t.numel()), default=0.0)
    for name in exact:
        if not len(actual[name]) == len(exact[name]) == len(baseline[name]):
            return f"{name}: {len(actual[name])} tensors, expected {len(exact[name])}"
        error = usual = scale = 0.0
        dtype = baseline[name][0].dtype if baseline[name] else torch.float64
        for i, (got, want, base) in enumerate(zip(actual[name], exact[name], baseline[name], strict=True)):
            if got.shape != want.shape:
                return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            if got.dtype != base.dtype:
                return f"{name}: dtype {got.dtype}, expected {base.dtype}"
            if want.numel() == 0:
                continue
            if not torch.isfinite(got).all():
                return f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
            distance = (got.double() - want.double()).abs()
            error = max(error, float((distance - slack[name][i] if slack else distance).max()))
            usual = max(usual, float((base.double() - want.double()).abs().max()))
            scale = max(scale, float(want.abs().max()))
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        floor = scale * (ROUNDINGS * torch.finfo(dtype).eps + ACCUMULATION_ULPS * torch.finfo(accumulation).eps)
        floor += largest * DEFINITION_ULPS * torch.finfo(torch.float64).eps
        floor += (
            torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        )  # what is rounded below that, to 0 or to it
        budget = factor * usual + floor
        if not error <= budget:
            return (
                f"{name}: error {error:.3g} is over the budget {budget:.3g} (PyTorch's error {usual:.3g},"
                f" largest value {scale:.3g})"
            )
    return None


def assert_within_budget(
    actual: Mapping[str, Sequence[Tensor]],
    exact: Mapping[str, Sequence[Tensor]],
    baseline: Mapping[str, Sequence[Tensor]],
    *,
    factor: float = 3.0,
    slack: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Each group's largest error against ``exact`` is at most ``factor`` times that of ``baseline``, plus a floor.

    Args:
        actual: results of :func:`evaluate` of the implementation under test.
        exact: the same in float64, from a definition.
        baseline: the same from PyTorch in the dtype under test.
        factor: how many times PyTorch's error is allowed.
        slack: for each value an error that does not count, such as that of the other branch beside a kink.

    Raises:
        AssertionError: a shape or dtype differs, a value is not finite, or an error is over its budget.
    """
    wrong = over_budget(actual, exact, baseline, factor=factor, slack=slack)
    if wrong is not None:
        raise AssertionError(wrong)  # with `python -O`, too
