"""Results as data: rows, and the file that keeps them with the machine, the versions and the limits."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.case import BASELINE, OURS, key, size_text
from benchmarks.harness.kernels import KernelTime
from benchmarks.harness.limits import Limits
from benchmarks.harness.timing import QUICK, Budget, Timing

OK, FAILED, UNAVAILABLE, BUSY = "ok", "FAILED", "unavailable", "busy"


@dataclass
class Outcome:
    """One contender in one row.

    ``error`` is its largest error as a share of what was allowed; ``reason`` says why there is no ``timing``. ``peak``
    is the most memory that a call holds beyond its inputs, results included, in MiB, where that was measured.
    """

    label: str
    status: str
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None
    peak: float | None = None


@dataclass
class Row:
    """One case with the outcome of every contender. Times are milliseconds.

    ``kernels``: on a GPU, each launch of our kernels in one call, or ``no_kernels`` says why they are not known.
    ``date`` is when it was measured, ``versions`` those of a row that was kept from a run with others.
    """

    workload: str
    work: str
    dtype: str
    size: dict[str, int]
    flop: float
    traffic: float
    resident: bool
    outcomes: dict[str, Outcome]
    limit_ms: float = math.nan
    limited_by: str = ""
    gemm_ms: float | None = None  # as many products by one GEMM of PyTorch's, of its best shape
    baseline: str = BASELINE
    kernels: list[KernelTime] = field(default_factory=list)
    no_kernels: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """That of its case."""
        return key(self.workload, self.work, self.dtype, self.size)

    @property
    def title(self) -> str:
        return f"{self.workload} {size_text(self.size)} {self.work} {self.dtype}"

    def set_limit(self, limits: Limits) -> None:
        for kernel in self.kernels:
            kernel.set_limit(limits, self.dtype, self.resident)
        seconds, self.limited_by = limits.seconds(self.flop, self.traffic, self.dtype, self.resident)
        self.limit_ms = 1e3 * seconds
        self.gemm_ms = 1e3 * self.flop / limits.gemm[self.dtype]

    @property
    def disturbed(self) -> bool:
        """Whether it has no times as the machine was busy."""
        return any(outcome.status == BUSY for outcome in self.outcomes.values())

    @property
    def failed(self) -> bool:
        """Whether some contender computed something wrong."""
        return any(outcome.status == FAILED for outcome in self.outcomes.values())

    def outlasts(self, newer: Row) -> bool:
        """Whether it says more than a newer one of the same case, which has no times as the machine was busy."""
        timed = any(outcome.timing for outcome in self.outcomes.values())
        return timed and newer.disturbed and not newer.failed

    def timing(self, name: str) -> Timing | None:
        outcome = self.outcomes.get(name)
        return outcome.timing if outcome else None

    def speedup(self, over: str, of: str = OURS) -> float | None:
        """How many times as fast one contender is as another; None where either was not timed."""
        slow, fast = self.timing(over), self.timing(of)
        return slow.median / fast.median if slow and fast else None

    def tflops(self, name: str) -> float | None:
        """Achieved TFLOP/s."""
        timing = self.timing(name)
        return self.flop / timing.median * 1e-9 if timing else None

    def share_of_limit(self, name: str) -> float | None:
        """1 where the contender takes no longer than arithmetic and traffic allow at this machine's measured rates."""
        timing = self.timing(name)
        return self.limit_ms / timing.median if timing else None

    def derived(self) -> dict[str, Any]:
        """Figures for readers of the JSON, which follow from the others."""
        others = [name for name in self.outcomes if name != OURS]
        return {
            "speedup_of_ours_over": {name: self.speedup(name) for name in others},
            "tflops": {name: self.tflops(name) for name in self.outcomes},
            "share_of_limit": {name: self.share_of_limit(name) for name in self.outcomes},
        }


@dataclass
class Report:
    """A run of some suites: the rows of those that measure time, the data of the studies.

    ``date`` and ``versions`` are the last run's. Rows that it did not measure say themselves where theirs are others.
    """

    suites: list[str]
    date: str
    device: str
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    budget: dict[str, float]
    limits: dict[str, Any]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    studies: dict[str, Any] = field(default_factory=dict)

    @property
    def every_row(self) -> list[Row]:
        """Those of all suites."""
        return [row for rows in self.rows.values() for row in rows]

    @property
    def dates(self) -> str:
        """When it was measured: a day, or the first and the last one where rows differ."""
        days = {row.date or self.date for row in self.every_row}
        if self.studies or not days:
            days.add(self.date)
        return min(days) if len(days) == 1 else f"{min(days)} to {max(days)}"

    def version(self, package: str) -> str:
        """That of a package, or all of them where rows differ."""
        found = {row.versions.get(package, self.versions[package]) for row in self.every_row}
        return " and ".join(sorted(found)) or self.versions[package]

    @property
    def failed(self) -> bool:
        """Whether some contender computed something wrong."""
        return any(row.failed for row in self.every_row)

    @property
    def quick(self) -> bool:
        """Whether it is a smoke test, whose times are none to show."""
        return self.budget == dataclasses.asdict(QUICK)

    @property
    def file_name(self) -> str:
        quick = "-quick" if self.quick else ""
        return f"{'-'.join(self.suites)}-{machine.slug(self.machine)}{quick}.json"


def new_report(suites: Sequence[str], device: torch.device, budget: Budget) -> Report:
    return Report(
        suites=list(suites),
        date=machine.today(),
        device=device.type,
        threads=torch.get_num_threads(),
        machine=machine.describe(device),
        versions=machine.versions(),
        budget=dataclasses.asdict(budget),
        limits={},
    )


def limits_as_json(limits: Limits) -> dict[str, Any]:
    return {
        "gemm_tflops": {name: rate * 1e-12 for name, rate in limits.gemm.items()},
        "register_tflops": {name: rate * 1e-12 for name, rate in limits.registers.items()},
        "gemm_shape_mnk": {name: list(shape) for name, shape in limits.gemm_shape.items()},
        "read_gb_s": limits.read * 1e-9,
        "resident_read_gb_s": limits.resident_read * 1e-9,
        "copy_gb_s": limits.copy * 1e-9,
    }


def raise_limits(limits: Limits, data: Mapping[str, Any]) -> None:
    """To those of :func:`limits_as_json`, where they are higher."""
    for name, rate in data["gemm_tflops"].items():
        if 1e12 * rate > limits.gemm.get(name, 0.0):
            limits.gemm[name], limits.gemm_shape[name] = 1e12 * rate, tuple(data["gemm_shape_mnk"][name])
    for name, rate in data.get("register_tflops", {}).items():
        limits.registers[name] = max(1e12 * rate, limits.registers.get(name, 0.0))
    for name in ("read", "resident_read", "copy"):
        setattr(limits, name, max(1e9 * data[f"{name}_gb_s"], getattr(limits, name)))


def arithmetic_tflops(limits: Mapping[str, Any], dtype: str) -> float:
    """The rate that limits products of a dtype: of registers alone, or PyTorch's where that is not known."""
    rate: float = max(limits["gemm_tflops"][dtype], limits.get("register_tflops", {}).get(dtype, 0.0))
    return rate


def rates(limits: Mapping[str, Any]) -> str:
    """The rates of products in words, PyTorch's last."""
    kinds = {"register peak": limits.get("register_tflops", {}), "GEMM": limits["gemm_tflops"]}
    return "; ".join(
        f"{kind} {', '.join(f'{rate:.3g} TFLOP/s in {dtype}' for dtype, rate in sorted(found.items()))}"
        for kind, found in kinds.items()
        if found
    )


def merged(reports: Sequence[Report]) -> Report:
    """One report of all suites; the limits are the last ones measured, which can only have risen."""
    first = reports[0]
    return dataclasses.replace(
        first,
        suites=[name for part in reports for name in part.suites],
        limits=next((part.limits for part in reversed(reports) if part.limits), {}),
        rows={name: rows for part in reports for name, rows in part.rows.items()},
        studies={name: data for part in reports for name, data in part.studies.items()},
    )


def save(report: Report, path: Path) -> Path:
    """Writes JSON; returns its path. Unless ``path`` ends in .json, it is a folder for ``<suite>-<machine>.json``.

    What was there stays until all is written, so that a run that is cut off leaves a whole file.
    """
    if path.suffix != ".json":
        path = path / report.file_name
    data = dataclasses.asdict(report)
    for name, rows in report.rows.items():
        for row, plain in zip(rows, data["rows"][name], strict=True):
            plain["derived"] = row.derived()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def earlier(report: Report, folder: Path) -> Report | None:
    """What a folder has of the same suites."""
    path = folder / report.file_name
    return load(path) if path.is_file() else None


def differences(old: Report, new: Report, names: Sequence[str]) -> list[str]:
    """Of what figures depend on, each that is not the same in two reports."""
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def kept(old: Report, new: Report, rows: Sequence[Row]) -> list[Row]:
    """Rows of ``old`` as rows of ``new``: with their own versions, where those of the report are not theirs."""
    found = []
    for row in rows:
        versions = row.versions or old.versions
        found.append(dataclasses.replace(row, versions={} if versions == new.versions else versions))
    return found


def load(path: Path) -> Report:
    """Reads what :func:`save` wrote.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no file of results: {error}") from error
    rows = {name: [_row(row, data["date"]) for row in plain] for name, plain in data.pop("rows").items()}
    return Report(**data, rows=rows)


def _row(data: Mapping[str, Any], date: str) -> Row:
    """In files of before rows had dates, that of the file is theirs."""
    data = {**data, "date": data.get("date") or date}
    fields = {key: value for key, value in data.items() if key != "derived"}
    outcomes = {}
    for name, plain in fields["outcomes"].items():
        timing = plain["timing"]
        outcomes[name] = Outcome(**{**plain, "timing": Timing(**timing) if timing else None})
    kernels = [KernelTime(**plain) for plain in fields.pop("kernels", [])]
    return Row(**{**fields, "outcomes": outcomes, "kernels": kernels})
