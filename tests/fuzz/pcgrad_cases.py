"""Cases of ``pcgrad``."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mtlkernels as mk
from mtlkernels._backends import interpreting
from mtlkernels.testing import some_rows
from tests.fuzz import calls, tensors
from tests.fuzz.calls import Way
from tests.fuzz.memory import guarded
from tests.ops.pcgrad.definition import EXACT, assert_right

SHAPES = ((7,), (), (1,), (0,), (5, 3), (300,), (33, 65), (4, 3, 3, 3), (17, 1), (4097,), (20000,))
SCALES = ("alike", "wide", "tiny", "huge")


@dataclass(frozen=True)
class Parameter:
    """A parameter's shape and what its gradients are in; ``sparse`` where most tasks give some rows alone."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    sparse: bool = False


@dataclass(frozen=True)
class PCGradCase:
    """A call of ``pcgrad``; ``missing`` is the share of gradients that are None, ``special`` stands in one element."""

    tasks: int
    parameters: tuple[Parameter, ...]
    way: Way
    reduction: str = "sum"
    include_self: bool = False
    normalize: bool = False
    project: bool = True
    max_norm: float | None = None
    eps: float = 0.0
    scales: str = "alike"
    missing: float = 0.0
    special: str = ""
    seed: int = 0


@st.composite
def _cases(draw: st.DrawFn) -> PCGradCase:
    scales = draw(st.sampled_from(SCALES))
    # What float16 would not hold is no question for a kernel.
    dtypes = st.sampled_from(("float32", "bfloat16", "float64", *(("float16",) if scales == "alike" else ())))
    shapes = st.sampled_from(SHAPES[:7] if interpreting() else SHAPES)
    parameter = st.builds(
        Parameter, shapes, dtypes, st.sampled_from(tensors.LAYOUTS), st.sampled_from((False, False, True))
    )
    return PCGradCase(
        tasks=draw(st.integers(1, 6 if interpreting() else 12)),
        parameters=tuple(draw(st.lists(parameter, min_size=1, max_size=6))),
        way=draw(tensors.ways("pcgrad")),
        reduction=draw(st.sampled_from(("sum", "mean"))),
        include_self=draw(st.booleans()),
        normalize=draw(st.sampled_from((False, False, True))),
        project=draw(st.sampled_from((True, True, False))),
        max_norm=draw(st.sampled_from((None, None, 0.5, 2.0))),
        eps=draw(st.sampled_from((0.0, 0.0, 1e-3))),
        scales=scales,
        missing=draw(st.sampled_from((0.0, 0.15, 0.6))),
        special=draw(st.sampled_from(("", "", "", "", *tensors.SPECIAL))),
        seed=draw(tensors.seeds),
    )


CASES: st.SearchStrategy[PCGradCase] = _cases()


def _scales(kind: str, tasks: int, rng: random.Random) -> list[float]:
    low, high = {"alike": (-2, 1), "wide": (-12, 8), "tiny": (-25, -20), "huge": (20, 25)}[kind]
    return [10.0 ** rng.uniform(low, high) for _ in range(tasks)]


def gradients_of(case: PCGradCase) -> tuple[list[list[Tensor | None]], Tensor]:
    """A list a task, and an order of projections."""
    rng, generator = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    scales = _scales(case.scales, case.tasks, rng)
    columns = []
    for parameter in case.parameters:
        dtype, shape = tensors.of_name(parameter.dtype), parameter.shape
        common = torch.randn(shape, generator=generator)  # makes tasks agree or conflict
        column: list[Tensor | None] = []
        for scale in scales:
            if rng.random() < case.missing:
                column.append(None)
                continue
            values = torch.randn(shape, generator=generator) + rng.uniform(-1.5, 1.5) * common
            grad = (values * (0.0 if rng.random() < 0.1 else scale)).to(dtype)
            if parameter.sparse and shape and rng.random() < 0.8:
                column.append(some_rows(grad, rng))
            else:
                column.append(guarded(tensors.in_layout(grad, parameter.layout), case.way.side))
        columns.append(column)
    order = torch.stack([torch.randperm(case.tasks, generator=generator) for _ in range(case.tasks)])
    return [list(row) for row in zip(*columns, strict=True)], order


def check(case: PCGradCase) -> None:
    """The result against walking over whole gradients in float64.

    Raises:
        AssertionError: what is wrong.
    """
    calls.counts[f"by {case.way.implementation}"] += 1
    grads, order = gradients_of(case)
    options: dict[str, Any] = {
        name: getattr(case, name) for name in ("reduction", "include_self", "normalize", "project", "max_norm", "eps")
    }
    special = _put_special(case, grads) if case.special else None
    with calls.made_by(case.way):
        found = mk.pcgrad(grads, order=order, **options)
    if special is None:
        assert_right(found, grads, order, sums=EXACT if case.way.implementation == "reference" else None, **options)
        return
    result = found[special]
    assert result is not None
    value = result.to_dense().flatten()[0].item()
    if math.isfinite(value):
        raise AssertionError(f"parameter {special} has {value} where a gradient was {case.special}")


def _put_special(case: PCGradCase, grads: list[list[Tensor | None]]) -> int | None:
    """The number in the first element of a dense gradient; of which parameter, if there is any."""
    dense = [(p, g) for row in grads for p, g in enumerate(row) if g is not None and not g.is_sparse and g.numel()]
    if not dense:
        return None
    calls.counts["special values"] += 1
    parameter, grad = dense[case.seed % len(dense)]
    grad[(0,) * grad.dim()] = float(case.special)
    return parameter
