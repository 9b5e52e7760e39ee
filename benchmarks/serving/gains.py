"""How far this package is ahead of the serving runtimes, from the rows of a file of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.serving.contenders import OWN, RUNTIMES

# The heading of the column that has it.
VS_RUNTIMES = "vs the better runtime, each on its better number of threads"


def over_runtimes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """How many times as fast as the better of the runtimes the better of :data:`OWN` is, under the row's load.

    ``rows`` are those of the file. A server need not give a runtime all of its threads, and a runtime may take longer
    on two than on one: its latency is the best that it has for the same inputs on the row's threads or on fewer. Where
    one of these rows has no runtime's time, as the machine was busy, there is no gain: it could only look better.
    """
    measure = "p50" if "p50" in row else "calls_a_second"
    ours = [row[measure][name] for name in OWN if name in row[measure]]
    comparable = [row, *(other for other in rows if _same_on_fewer_threads(row, other))]
    if not ours or not all(any(name in other[measure] for name in RUNTIMES) for other in comparable):
        return None
    runtimes = [other[measure][name] for other in comparable for name in RUNTIMES if name in other[measure]]
    return min(runtimes) / min(ours) if measure == "p50" else max(ours) / max(runtimes)


def _same_on_fewer_threads(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = all(row[name] == other[name] for name in ("model", "dtype", "rows", "clients"))
    return same and other["threads"] < row["threads"]
