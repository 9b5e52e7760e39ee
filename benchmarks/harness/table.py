"""A report as a table: aligned text for the terminal, Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.case import OURS, size_text
from benchmarks.harness.report import BUSY, FAILED, OK, Outcome, Report, Row, rates


def contenders(rows: Sequence[Row]) -> list[str]:
    """Names in the order of first appearance, mtlkernels last."""
    names = list(dict.fromkeys(name for row in rows for name in row.outcomes if name != OURS))
    return [*names, OURS] if any(OURS in row.outcomes for row in rows) else names


def milliseconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _time(outcome: Outcome | None, spread: bool) -> str:
    if outcome is None:
        return ""
    if outcome.timing is None:
        return outcome.status if outcome.status in (FAILED, BUSY) else "n/a"
    text = milliseconds(outcome.timing.median)
    return f"{text} ±{100 * outcome.timing.spread:.0f}%" if spread else text


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _mebibytes(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return "–" if outcome.peak is None else milliseconds(outcome.peak)


def _cells(row: Row, names: Sequence[str], spread: bool, memory: bool) -> list[str]:
    ours, share = row.tflops(OURS), row.share_of_limit(OURS)
    return [
        row.workload,
        size_text(row.size),
        row.work,
        row.dtype,
        milliseconds(row.flop * 1e-9),
        *(_time(row.outcomes.get(name), spread) for name in names),
        *(_times(row.speedup(name)) for name in names if name != OURS),
        "–" if ours is None else f"{ours:.3g}",
        milliseconds(row.limit_ms),
        "–" if share is None else f"{100 * share:.0f}%",
        *(_mebibytes(row.outcomes.get(name)) for name in names if memory),
        row.limited_by,
    ]


def _grid(rows: Sequence[Row], spread: bool) -> list[list[str]]:
    names = contenders(rows)
    head = ["", "size", "work", "dtype", "GFLOP"]
    head += [f"{name} ms" for name in names]
    head += [f"vs {name}" for name in names if name != OURS]
    head += ["TFLOP/s", "limit ms", "of limit"]
    memory = any(outcome.peak is not None for row in rows for outcome in row.outcomes.values())
    head += [f"{name} MiB" for name in names if memory] + ["limited by"]
    return [head] + [_cells(row, names, spread, memory) for row in rows]


def _notes(rows: Sequence[Row]) -> list[str]:
    """What each name stands for, and why a cell is empty."""
    labels = {name: row.outcomes[name].label for row in rows for name in row.outcomes}
    notes = ["; ".join(f"{name}: {labels[name]}" for name in contenders(rows))]
    for row in rows:
        for name, outcome in row.outcomes.items():
            if outcome.status != OK:
                title = f"{row.workload} {size_text(row.size)} {row.work} {row.dtype}"
                notes.append(f"{title}: {name} {outcome.status}: {outcome.reason}")
    return notes


def text(rows: Sequence[Row]) -> str:
    """Aligned columns. Times are medians in milliseconds, with half the distance of the quartiles."""
    grid = _grid(rows, spread=True)
    widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 4 or column == len(widths) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in grid
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines + [""] + _notes(rows))


def markdown(rows: Sequence[Row]) -> str:
    """The same rows for a README. Times are medians in milliseconds; speed-ups are those of mtlkernels."""
    grid = _grid(rows, spread=False)
    marks = ["---" if column < 4 or column == len(grid[0]) - 1 else "---:" for column in range(len(grid[0]))]
    lines = [f"| {' | '.join(line)} |" for line in [grid[0], marks, *grid[1:]]]
    return "\n".join(lines + [""] + [f"{note}.\n" for note in _notes(rows)]).rstrip() + "\n"


def kernels(rows: Sequence[Row]) -> str:
    """What each launch of our kernels takes of its limit, for the rows where that is known; empty if it is for none."""
    lines = []
    for row in rows:
        if row.kernels or row.no_kernels:
            lines.append(f"{row.workload} {size_text(row.size)} {row.work} {row.dtype}: {row.no_kernels}".rstrip(": "))
        for kernel in row.kernels:
            lines.append(
                f"  {kernel.kernel:<16}{milliseconds(1e-9 * kernel.flop):>8} GFLOP{1e-6 * kernel.traffic:>10.1f} MB"
                f"{1e3 * kernel.ms:>10.1f} µs  limit{1e3 * kernel.limit_ms:>9.1f} µs"
                f"{100 * kernel.share_of_limit:>5.0f}%  {kernel.limited_by}"
            )
    return "\n".join(lines)


def machine(report: Report) -> str:
    """One paragraph: where and with what this was measured, and the limits of that machine."""
    m, limits = report.machine, report.limits
    v = {name: report.version(name) for name in ("torch", "triton", "python", "mtlkernels")}
    place = f"{m['gpu']} ({m['gpu_capability']})" if "gpu" in m else f"{m['cpu']}, {m['cores']} cores"
    text = (
        f"{place}, {report.threads} threads, {m['cpu_capability']} ({', '.join(m['isa'])}); "
        f"torch {v['torch']}, triton {v['triton']}, python {v['python']}, mtlkernels {v['mtlkernels']}; {report.dates}."
    )
    if not limits:  # nothing was timed
        return text
    return (
        f"{text} Measured limits: {rates(limits)}; memory read {limits['read_gb_s']:.3g} GB/s,"
        f" copy {limits['copy_gb_s']:.3g} GB/s, read in cache {limits['resident_read_gb_s']:.3g} GB/s."
    )
