"""A roofline: what each row achieves against what the machine allows at its arithmetic a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.harness.case import FORWARD, OURS
from benchmarks.harness.report import Report, Row, arithmetic_tflops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
GREY, BLUE = "#777777", "#0072B2"
# How far the axes reach beyond the points, as a factor.
MARGIN = 2.5


def roofline(figure: Figure, rows: Sequence[Row], report: Report, heading: str) -> None:
    """A panel a dtype: for each row the baseline's rate and ours, joined by a line, below the roofs."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    markers = {kind: MARKERS[index % len(MARKERS)] for index, kind in enumerate(kinds)}
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure.set_size_inches(max(8.5, 6.2 * len(dtypes) + 0.6), 6.6)
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharex=True, sharey=True)[0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        for row in rows:
            if row.dtype == dtype:
                _points(axes, row, markers[_kind(row)])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{dtype}, at most {arithmetic_tflops(report.limits, dtype):.3g} TFLOP/s")
        axes.set_xlabel("arithmetic a byte that has to move (FLOP/byte)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    intensities = [row.flop / row.traffic for row in rows]
    low, high = min(intensities) / MARGIN, max(intensities) * MARGIN
    for dtype, axes in zip(dtypes, panels, strict=True):
        axes.set_xlim(low, high)
        _roofs(axes, report.limits, dtype, low, high)
    panels[0].set_ylabel("achieved rate (TFLOP/s)")
    figure.suptitle(heading, fontsize=11)
    handles = [_handle(BLUE, "o", "mtlkernels"), _handle(GREY, "o", rows[0].outcomes[rows[0].baseline].label)]
    handles += [_handle("black", markers[kind], kind, fill=False) for kind in kinds]
    handles += panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _kind(row: Row) -> str:
    """What shares a marker."""
    return row.workload if row.work not in (FORWARD, f"{FORWARD}+backward") else f"{row.workload} {row.work}"


def _points(axes: Axes, row: Row, marker: str) -> None:
    at = row.flop / row.traffic
    before, after = row.tflops(row.baseline), row.tflops(OURS)
    if before and after:
        axes.plot([at, at], [before, after], color=BLUE, linewidth=0.8, alpha=0.5, zorder=2)
    for value, colour in ((before, GREY), (after, BLUE)):
        if value:
            axes.plot(at, value, color=colour, marker=marker, markersize=7, linestyle="none", zorder=3)


def _roofs(axes: Axes, limits: Mapping[str, Any], dtype: str, low: float, high: float) -> None:
    """The rate of products, and below it what memory and cache can feed."""
    peak = arithmetic_tflops(limits, dtype)
    for name, style, word in (("read_gb_s", "-", "memory"), ("resident_read_gb_s", ":", "cache")):
        slope = limits[name] * 1e-3  # TFLOP/s for each FLOP/byte
        x = [low, min(max(peak / slope, low), high), high]
        y = [min(peak, slope * at) for at in x]
        label = f"limit by {word}, {limits[name]:.3g} GB/s"
        axes.plot(x, y, color="black", linestyle=style, linewidth=1.3, zorder=1, label=label)


def _handle(colour: str, marker: str, label: str, fill: bool = True) -> Any:
    from matplotlib.lines import Line2D

    face = colour if fill else "none"
    return Line2D(
        [], [], color=colour, marker=marker, markerfacecolor=face, linestyle="none", markersize=7, label=label
    )
