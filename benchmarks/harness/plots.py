"""Plots of a report: speed-up bars, a roofline, and time against a size on log axes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import table
from benchmarks.harness.case import OURS, Curve, Study, Suite, amount, size_text
from benchmarks.harness.report import Report, Row
from benchmarks.harness.roofline import roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; mtlkernels gets the strongest of it.
COLOURS = {
    "compile": "#E69F00",
    "frozen": "#D55E00",
    "graph": "#CC79A7",
    "batched": "#56B4E9",
    "prepared": "#009E73",
    OURS: "#0072B2",
}
MARKERS = {"compile": "s", "frozen": "X", "graph": "D", "batched": "^", "prepared": "P", OURS: "*"}
BASELINE_COLOUR, BASELINE_MARKER = "#777777", "o"
OTHER_COLOURS = ("#009E73", "#D55E00", "#56B4E9", "#F0E442", "#CC79A7", "#332288", "#882255")
OTHER_MARKERS = ("v", "P", "X", "<", ">", "p", "h")
# Inches: a title with the machine's name, and an entry of a legend.
TITLE_WIDTH, LEGEND_WIDTH = 8.5, 3.2
AXES = {
    "B": "B (rows)",
    "E": "E (experts)",
    "T": "T (tasks)",
    "P": "P (parameters)",
    "open": "open routes to each output",
}
# Bars that differ by more than this are on a log axis.
WIDE = 30.0
# Kernels may pass it, where their products are faster than PyTorch's.
LIMIT = "limit: register peak, or bandwidth"


def draw(suite: Suite, rows: Sequence[Row], report: Report, folder: Path) -> list[Path]:
    """Writes the plots of a suite; their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []

    def save(figure: Figure, kind: str) -> None:
        FigureCanvasAgg(figure)
        path = _path(folder, report, suite.name, f"-{kind}")
        figure.savefig(path, dpi=130)
        written.append(path)

    bars = [row for row in rows if row.workload not in suite.sweeps]
    if any(row.timing(row.baseline) for row in bars):
        figure = Figure(layout="constrained")
        speedups(figure, bars, suite.title, where(report))
        save(figure, "speedup")
    timed = [row for row in rows if row.timing(OURS)]
    if timed:
        figure = Figure(layout="constrained")
        roofline(figure, timed, report, f"{suite.title}: roofline\n{where(report)}")
        save(figure, "roofline")
    for curve in suite.curves:
        chosen = [
            row
            for row in rows
            if row.workload in curve.workloads
            and row.work == curve.work
            and all(row.size.get(axis) == value for axis, value in curve.fixed.items())
        ]
        points = {(row.dtype, row.size[curve.axis]) for row in chosen}
        dtypes = [dtype for dtype, _ in points]
        chosen = [row for row in chosen if dtypes.count(row.dtype) > 1]
        if chosen:
            figure = Figure(layout="constrained")
            cost(figure, chosen, curve, where(report))
            save(figure, curve.name)
    return written


def draw_study(study: Study, report: Report, folder: Path) -> Path:
    """Writes the plot of a study; its path."""
    path = _path(folder, report, study.name, "")
    study.draw(report.studies[study.name], where(report), path)
    return path


def _path(folder: Path, report: Report, suite: str, kind: str) -> Path:
    """Named as the report's JSON is, but for one suite."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = report.file_name.removesuffix(".json")
    if len(report.suites) > 1:
        stem = stem.replace("-".join(report.suites), suite, 1)
    return folder / f"{stem}{kind}.png"


def where(report: Report) -> str:
    """The machine in one short line."""
    m = report.machine
    cpu = f"{m['cpu']}, {report.threads} threads, {m['cpu_capability']}{' + AMX' if 'amx_tile' in m['isa'] else ''}"
    return f"{m.get('gpu', cpu)}, torch {report.version('torch')}, {report.dates}"


def _style(names: Sequence[str], baseline: str) -> tuple[dict[str, str], dict[str, str]]:
    """A colour and a marker for each contender, which repeat where there are too many."""
    others = [name for name in names if name not in COLOURS and name != baseline]
    colours = COLOURS | dict(zip(others, itertools.cycle(OTHER_COLOURS), strict=False)) | {baseline: BASELINE_COLOUR}
    markers = MARKERS | dict(zip(others, itertools.cycle(OTHER_MARKERS), strict=False)) | {baseline: BASELINE_MARKER}
    return colours, markers


def _labels(rows: Sequence[Row]) -> dict[str, str]:
    return {name: row.outcomes[name].label for row in rows for name in row.outcomes}


def _panels(figure: Figure, rows: Sequence[Row], together: bool, **shared: Any) -> list[tuple[str, list[Row], Axes]]:
    """Axes side by side, one a dtype, or one for all of them: what stands above, the rows, the axes."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault("" if together else row.dtype, []).append(row)
    axes = figure.subplots(1, len(parts), squeeze=False, **shared)[0]
    return [(heading, mine, at) for (heading, mine), at in zip(parts.items(), axes, strict=True)]


def speedups(figure: Figure, rows: Sequence[Row], title: str, place: str) -> None:
    """Bars of each contender's speed over the baseline's, and a mark at what the machine's limit would allow."""
    baseline = rows[0].baseline
    names = [name for name in table.contenders(rows) if name != baseline]
    colours, _ = _style(names, baseline)
    labels = _labels(rows)
    dtypes = {row.dtype for row in rows}
    groups = list(dict.fromkeys(_group(row) for row in rows))
    # A panel a dtype, unless most of it would be empty.
    together = len(rows) < 0.75 * len(dtypes) * len(groups)
    if together:
        groups = [f"{_group(row)} {row.dtype}" for row in rows]
    panels = _panels(figure, rows, together, sharey=True)
    width = max(TITLE_WIDTH, 6.2 * len(panels) + 1.5)
    figure.set_size_inches(width, 0.26 * (len(names) + 1) * len(groups) + 2.2)
    values = [value for row in rows for name in names if (value := row.speedup(baseline, name)) is not None]
    wide = bool(values) and max(values) > WIDE * min(values)
    thickness = 0.8 / len(names)
    for heading, mine, axes in panels:
        # Bars outside the panel's reach would squeeze the others; a limit far beyond is marked at the edge instead.
        found = [row.speedup(baseline, name) or 0.0 for row in mine for name in names]
        reach = 1.25 * max(1.0, *found)
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for row in mine:
            at = groups.index(f"{_group(row)} {row.dtype}" if together else _group(row))
            for index, name in enumerate(names):
                _bar(axes, row, name, at + (index - (len(names) - 1) / 2) * thickness, thickness, colours[name])
            _limit_mark(axes, row, at, reach)
        axes.axvline(1.0, color=BASELINE_COLOUR, linewidth=1.2, zorder=0)
        axes.set_xlim(0.8 * min(1.0, *values) if wide else 0, (2.5 if wide else 1.12) * reach)
        axes.set_title(heading)
        axes.set_xlabel(f"times as fast as {rows[0].outcomes[baseline].label}")
        axes.spines[["top", "right"]].set_visible(False)
    first = panels[0][2]
    first.set_yticks(range(len(groups)), groups)
    first.set_ylim(len(groups) - 0.4, -0.6)
    figure.suptitle(f"{title}: speed-up\n{place}", fontsize=11)
    handles = [_patch(colours[name], labels[name]) for name in names] + [_limit_handle()]
    _legend(figure, handles, width)


def _group(row: Row) -> str:
    return f"{row.workload}  {size_text(row.size)}\n{row.work}"


def _bar(axes: Axes, row: Row, name: str, at: float, thickness: float, colour: str) -> None:
    if name not in row.outcomes:
        return
    value = row.speedup(row.baseline, name)
    if value is None:
        status = row.outcomes[name].status
        axes.text(0.01, at, status, va="center", fontsize=7.5, color=colour, transform=axes.get_yaxis_transform())
        return
    start = 1.0 if axes.get_xscale() == "log" else 0.0
    axes.barh(at, value - start, left=start, height=0.92 * thickness, color=colour)
    axes.annotate(
        f"{value:.2f}×" if value < 100 else f"{value:.0f}×",
        (max(value, start), at),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        weight="bold" if name == OURS else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # a limit's mark may lie behind
    )


def _limit_mark(axes: Axes, row: Row, at: int, reach: float) -> None:
    """A black line across the row's bars where the limit lies, or an arrow at the edge when it lies beyond."""
    base = row.timing(row.baseline)
    if base is None:
        return
    limit = base.median / row.limit_ms
    if limit <= reach:
        axes.vlines(limit, at - 0.43, at + 0.43, color="black", linewidth=1.6, zorder=2)
        return
    at_edge = 2.4 if axes.get_xscale() == "log" else 1.11
    axes.annotate(f"limit {limit:.1f}× →", (at_edge * reach, at), ha="right", va="center", fontsize=8)


def _legend(figure: Figure, handles: Sequence[Any], width: float) -> None:
    """Below everything, in as many columns as fit."""
    columns = min(len(handles), int(width / LEGEND_WIDTH))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _limit_handle() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="black", marker="|", linestyle="none", markersize=11, label=LIMIT)


def cost(figure: Figure, rows: Sequence[Row], curve: Curve, place: str) -> None:
    """Median time against a size, with the quartiles as a band and the machine's limit below."""
    names = table.contenders(rows)
    colours, markers = _style(names, rows[0].baseline)
    labels = _labels(rows)
    panels = _panels(figure, rows, False, sharey=True)
    width = max(TITLE_WIDTH, 5.4 * len(panels) + 0.6)
    figure.set_size_inches(width, 5.2)
    for heading, mine, axes in panels:
        mine.sort(key=lambda row: row.size[curve.axis])
        for name in names:
            points = [(row.size[curve.axis], t) for row in mine if (t := row.timing(name))]
            x = [at for at, _ in points]
            size = 11 if markers[name] == "*" else 6
            style: dict[str, Any] = {
                "color": colours[name],
                "marker": markers[name],
                "markersize": size,
                "label": labels[name],
            }
            axes.plot(x, [t.median for _, t in points], **style)
            axes.fill_between(
                x, [t.lower for _, t in points], [t.upper for _, t in points], color=colours[name], alpha=0.2
            )
        x = [row.size[curve.axis] for row in mine]
        limit = [row.limit_ms for row in mine]
        axes.plot(x, limit, color="black", linestyle="--", label=LIMIT)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [amount(at) for at in x])
        axes.set_xlabel(AXES.get(curve.axis, curve.axis))
        axes.set_title(heading)
        axes.grid(True, which="major", alpha=0.3)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0][2].set_ylabel("time of a call (ms)")
    figure.suptitle(f"{curve.title}\n{place}", fontsize=11)
    _legend(figure, panels[0][2].get_legend_handles_labels()[0], width)
