"""What a suite hands to the runner: cases, and for each the contenders and the float64 truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

FORWARD = "forward"
TRAINING = "forward+backward"
OURS = "ours"
BASELINE = "eager"


def amount(value: int) -> str:
    """A size as people write it: whole millions as M."""
    return f"{value // 1_000_000}M" if value and value % 1_000_000 == 0 else str(value)


def size_text(size: Mapping[str, int]) -> str:
    """A case's sizes in one line."""
    return ", ".join(f"{axis}={amount(value)}" for axis, value in size.items())


class Step(Protocol):
    """One unit of timed work, ready to run again and again.

    ``outputs`` are the tensors that the last call gave back.
    """

    outputs: Sequence[Tensor]

    def forget(self) -> None:
        """Lets go of the last results."""

    def __call__(self) -> None:
        """Lets go of the last results and does the work once; everything in here is timed."""

    def results(self) -> Mapping[str, Tensor]:
        """What the last call computed, under names that all contenders of the case share. Not timed."""


class Launch(Protocol):
    """What one launch of a kernel has to do: its name, its arithmetic, and the bytes that it moves at least."""

    @property
    def kernel(self) -> str: ...

    @property
    def flop(self) -> int: ...

    @property
    def traffic(self) -> int: ...


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Args:
        name: its key in tables and JSON; ``"ours"`` is mtlkernels.
        label: how plots call it.
        build: makes the step, with copies of the parameters that the case made. May raise where this install or
            device cannot run the contender; it is then reported as unavailable.
        expected: evaluates in float64 what this one computes, where it is a floor: it leaves a part of the work out,
            and shows what the rest costs. The budget is the baseline's all the same.
    """

    name: str
    label: str
    build: Callable[[], Step]
    expected: Callable[[], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Bench:
    """A case with its parameters and inputs made.

    Args:
        contenders: everybody who does the work, the baseline among them.
        expected: evaluates it in float64.
        baseline: the name of the contender whose error sets the budget of the others.
        slack: how many times as far off as usual contenders may be, where what users have sums inexactly by itself.
    """

    contenders: Sequence[Contender]
    expected: Callable[[], Mapping[str, Tensor]]
    baseline: str = BASELINE
    slack: float = 1.0


def key(workload: str, work: str, dtype: str, size: Mapping[str, int]) -> tuple[object, ...]:
    """What tells a row from the others of its suite."""
    return workload, work, dtype, *sorted(size.items())


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
        memory: whether the peak memory of a call is measured.
        launches: what each launch of our kernels has to do, in their order, where the device is a GPU.
        rounds: of timing that are enough where a call takes seconds; by default what the budget asks for.
        seconds: of timing that are enough, where a suite has many rows; by default what the budget has.
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
    memory: bool = False
    launches: Callable[[torch.device], Sequence[Launch]] | None = None
    rounds: int | None = None
    seconds: float | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from the other cases of its suite."""
        return key(self.workload, self.work, self.dtype_name, self.size)

    @property
    def title(self) -> str:
        return f"{self.workload} {size_text(self.size)} {self.work} {self.dtype_name}"


@dataclass(frozen=True)
class Curve:
    """A plot of time against one axis of ``size``, over the rows of some workloads whose other sizes are ``fixed``."""

    name: str
    title: str
    axis: str
    workloads: tuple[str, ...]
    work: str
    fixed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A family of cases.

    Args:
        cases: lists those of a device type.
        sweeps: workloads that are there for the curves, and left out of the bars.
    """

    name: str
    title: str
    cases: Callable[[str], Iterable[Case]]
    curves: tuple[Curve, ...] = field(default=())
    sweeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A suite that measures something else than time: what it found is data in JSON's types, and its own to show.

    Args:
        name, title: as those of a :class:`Suite`.
        run: does the work on a device; the flag asks for a smoke test.
        show: the data as text, or as Markdown where the flag is set.
        draw: writes the data's plot to a file; the string says where and when it was measured.
        retime: the data with the times in it measured anew; for studies that have some beside what they are about.
    """

    name: str
    title: str
    run: Callable[[torch.device, bool], dict[str, Any]]
    show: Callable[[Mapping[str, Any], bool], str]
    draw: Callable[[Mapping[str, Any], str, Path], None]
    retime: Callable[[torch.device, Mapping[str, Any]], dict[str, Any]] | None = None
