"""What a suite hands to the runner: cases, and for each the contenders and the float64 truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

FORWARD = "forward"
TRAINING = "forward+backward"
OURS = "ours"
BASELINE = "eager"


class Step(Protocol):
    """One unit of timed work, ready to run again and again."""

    def __call__(self) -> None:
        """Does the work once; everything in here is timed."""

    def results(self) -> Mapping[str, Tensor]:
        """What the last call computed, under names that all contenders of the case share. Not timed."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Args:
        name: its key in tables and JSON; ``"eager"`` is the baseline, ``"ours"`` is mtlkernels.
        label: how plots call it.
        build: makes the step, with copies of the parameters that the case made. May raise where this install or
            device cannot run the contender; it is then reported as unavailable.
    """

    name: str
    label: str
    build: Callable[[], Step]


@dataclass(frozen=True)
class Bench:
    """A case with its parameters and inputs made. ``expected`` evaluates it in float64."""

    contenders: Sequence[Contender]
    expected: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        workload: its name in performance tables, such as ``"A"``.
        work: what is timed, such as :data:`FORWARD`.
        dtype: of parameters and inputs.
        size: what varies within a workload, such as ``{"B": 64}``; the axes of plots.
        flop: the arithmetic that the work needs, a multiply-add counted as two.
        traffic: the bytes that the work has to move at least, each operand read or written once.
        build: makes parameters and inputs on a device.
        resident: the operands of one call stay in cache from one call to the next, as a serving model's weights do;
            the traffic is then held against the bandwidth of the cache instead of that of the memory.
        quick: whether ``--quick`` keeps the row.
    """

    workload: str
    work: str
    dtype: torch.dtype
    size: Mapping[str, int]
    flop: float
    traffic: float
    build: Callable[[torch.device], Bench]
    resident: bool = False
    quick: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        size = " ".join(f"{axis}={value}" for axis, value in self.size.items())
        return f"{self.workload} {size} {self.work} {self.dtype_name}"


@dataclass(frozen=True)
class Curve:
    """A plot of time against one axis of ``size``, over the rows of some workloads."""

    name: str
    title: str
    axis: str
    workloads: tuple[str, ...]
    work: str


@dataclass(frozen=True)
class Suite:
    """A family of cases. ``cases`` lists those of a device type."""

    name: str
    title: str
    cases: Callable[[str], Iterable[Case]]
    curves: tuple[Curve, ...] = field(default=())
