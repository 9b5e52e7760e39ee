"""Tables of a suite's rows for pages: columns, each with a heading and a text a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.case import OURS
from benchmarks.harness.report import Report, Row
from benchmarks.harness.table import milliseconds


@dataclass(frozen=True)
class Column:
    """A heading, and the text below it in each row."""

    heading: str
    cell: Callable[[Row], str]
    right: bool = True


def words(heading: str, cell: Callable[[Row], str]) -> Column:
    return Column(heading, cell, right=False)


def time(heading: str, *names: str, called: Mapping[str, str] | None = None) -> Column:
    """Median milliseconds, the fastest of ``names``; a dash where they were left out or refused.

    ``called``: what is written behind the time where a contender is the fastest.
    """

    def cell(row: Row) -> str:
        median = fastest(row, names)
        if median is None:
            return "–"
        text = f"**{milliseconds(median)}**" if OURS in names else milliseconds(median)
        word = next((w for name, w in (called or {}).items() if fastest(row, [name]) == median), None)
        return f"{text} ({word})" if word else text

    return Column(f"{heading}, ms", cell)


def fastest(row: Row, names: Sequence[str]) -> float | None:
    """The least of the medians of those that were timed."""
    return min((timing.median for name in names if (timing := row.timing(name))), default=None)


def gain(row: Row, over: Sequence[str]) -> float | None:
    """How many times as fast as the fastest of ``over`` mtlkernels is."""
    theirs, ours = fastest(row, over), row.timing(OURS)
    return theirs / ours.median if theirs and ours else None


def speedup(heading: str, *over: str, bold: bool = False) -> Column:
    """How many times as fast as the fastest of ``over`` mtlkernels is."""

    def cell(row: Row) -> str:
        value = gain(row, over)
        if value is None:
            return "–"
        text = f"{value:.0f}×" if value >= 100 else f"{value:#.3g}×"
        return f"**{text}**" if bold else text

    return Column(heading, cell)


def share(row: Row) -> str:
    value = row.share_of_limit(OURS)
    return "–" if value is None else f"{100 * value:.0f}%"


def peaks(baseline: str, heading: str) -> Column:
    """The most memory that a call holds, the baseline's and ours."""

    def cell(row: Row) -> str:
        before, after = (row.outcomes[name].peak for name in (baseline, OURS))
        return "–" if before is None or after is None else f"{before:,.0f} → {after:,.0f} MiB"

    return Column(f"peak memory, {heading} → ours", cell)


@dataclass(frozen=True)
class Table:
    """Some rows of a suite, under those columns that have something to say."""

    suite: str
    columns: Sequence[Column]
    shown: Callable[[Row], bool] = lambda row: True

    def __call__(self, found: Report) -> list[str]:
        rows = [row for row in found.rows.get(self.suite, []) if self.shown(row)]
        if not rows:
            raise ValueError(f"the suite {self.suite} has no rows to show")
        columns = [column for column in self.columns if any(column.cell(row) != "–" for row in rows)]
        lines = [
            [column.heading for column in columns],
            ["---:" if column.right else "---" for column in columns],
            *([column.cell(row) for column in columns] for row in rows),
        ]
        return [f"| {' | '.join(line)} |" for line in lines]
