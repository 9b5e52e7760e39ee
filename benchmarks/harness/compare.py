"""Two runs of the same rows: what got slower, and what faster, beyond noise.

Machines differ from day to day by more than a change of code does, so that times are not compared, but ratios: each
row's baseline was measured in turns with us, in the same minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness import machine
from benchmarks.harness.case import OURS
from benchmarks.harness.report import Report, Row

# Ratios of two runs of the same code differ by as much as this on a quiet machine, whatever the spread within a run.
LEAST_NOISE = 0.05


@dataclass(frozen=True)
class Change:
    """A row that both runs have. ``noise`` is the relative difference that their spreads explain."""

    title: str
    baseline: str
    before: float
    after: float
    noise: float

    @property
    def verdict(self) -> str:
        if self.after < self.before * (1 - self.noise):
            return "slower"
        return "faster" if self.after > self.before * (1 + self.noise) else "the same"

    def __str__(self) -> str:
        return (
            f"{self.verdict:>8}  {self.title}: {self.before:.2f}x -> {self.after:.2f}x over {self.baseline}"
            f" (noise {self.noise:.0%})"
        )


def changes(old: Report, new: Report) -> Iterator[Change]:
    """The rows in which both runs have timed us and the baseline."""
    known = {(suite, *_key(row)): row for suite, rows in old.rows.items() for row in rows}
    for suite, rows in new.rows.items():
        for row in rows:
            earlier = known.get((suite, *_key(row)))
            before = earlier.speedup(earlier.baseline) if earlier else None
            after = row.speedup(row.baseline)
            if earlier is None or before is None or after is None:
                continue
            timings = [r.timing(name) for r in (earlier, row) for name in (r.baseline, OURS)]
            spreads = [timing.spread for timing in timings if timing]
            yield Change(_title(suite, row), row.baseline, before, after, max(LEAST_NOISE, sum(spreads)))


def _key(row: Row) -> tuple[object, ...]:
    return row.workload, row.work, row.dtype, tuple(sorted(row.size.items()))


def _title(suite: str, row: Row) -> str:
    size = " ".join(f"{axis}={value}" for axis, value in row.size.items())
    return f"{suite} {row.workload} {size} {row.work} {row.dtype}"


def text(old: Report, new: Report) -> str:
    """A line for each change beyond noise, the slower ones first, and a summary."""
    found: Sequence[Change] = list(changes(old, new))
    beyond = sorted((c for c in found if c.verdict != "the same"), key=lambda c: c.after / c.before)
    slower = sum(c.verdict == "slower" for c in beyond)
    summary = (
        f"{len(found)} rows compared with {old.dates}: {slower} slower, {len(beyond) - slower} faster beyond noise"
    )
    return "\n".join([*map(str, beyond), *_circumstances(old, new), summary])


def _circumstances(old: Report, new: Report) -> list[str]:
    """What else differs between the runs, which ratios may depend on."""
    pairs = {"machine": (machine.slug(old.machine), machine.slug(new.machine)), "threads": (old.threads, new.threads)}
    pairs |= {name: (old.versions.get(name), new.versions.get(name)) for name in {**old.versions, **new.versions}}
    return [f"    note  {name}: {before} -> {after}" for name, (before, after) in pairs.items() if before != after]
