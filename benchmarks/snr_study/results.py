"""What the study of SNR found: tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.table import milliseconds
from benchmarks.snr_study.serving import BATCHES, COMPACT, FULL
from benchmarks.snr_study.trunks import AVER, MMOE, PLE, TRANS
from benchmarks.studies.results import COLOURS, auc_text, by_seed, data_note, gain_text, gains_over, lay_out

OF_KIND = dict(zip((MMOE, PLE, TRANS, AVER), (COLOURS[0], *COLOURS[2:]), strict=False))


def routed(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The variants that have routes."""
    return [variant for variant in data["variants"] if variant["kind"] in (TRANS, AVER)]


def times(data: Mapping[str, Any], variant: str, form: str, rows: int) -> np.ndarray:
    """[seeds]: milliseconds; empty for what has no such form."""
    found = [t for t in data["serving"]["times"] if (t["variant"], t["form"], t["rows"]) == (variant, form, rows)]
    return np.array([t["milliseconds"] for t in found])


def unpenalised(data: Mapping[str, Any], kind: str) -> str:
    """The name of a trunk's variant without a penalty, sampled."""
    return str(next(v["name"] for v in data["variants"] if v["kind"] == kind and v["sampled"] and not v["weight"]))


def _open(data: Mapping[str, Any], variant: str) -> str:
    share = 100 * by_seed(data, variant, "open")
    return f"{share.mean():.0f}% ({share.min():.0f}–{share.max():.0f})"


def _aucs(data: Mapping[str, Any], markdown: bool) -> list[str]:
    """A line a variant, with gains over the baseline."""
    head = ["trunk", "open routes"]
    for task in data["tasks"]:
        head += [f"AUC {task}", "gain ×1000"]
    grid = []
    names = {variant["name"] for variant in routed(data)}
    for variant in data["variants"]:
        name = variant["name"]
        line = [name, _open(data, name) if name in names else ""]
        auc, gain = by_seed(data, name, "auc"), gains_over(data, name, data["baseline"])
        for task in range(auc.shape[1]):
            line += [auc_text(auc[:, task]), "" if name == data["baseline"] else gain_text(gain[:, task])]
        grid.append(line)
    return lay_out(head, grid, markdown)


def _differences(data: Mapping[str, Any], markdown: bool) -> list[str]:
    """What sampling costs, and what each weight changes, within one kind of SNR: the first weights are the same."""
    grid = []
    for variant in routed(data):
        base = unpenalised(data, variant["kind"])
        if variant["name"] != base:
            gain = gains_over(data, variant["name"], base)
            grid.append([variant["name"], *(gain_text(gain[:, task]) for task in range(gain.shape[1]))])
    return lay_out(["AUC ×1000 over the same SNR, sampled, with L0 0", *data["tasks"]], grid, markdown)


def _serving(data: Mapping[str, Any], markdown: bool) -> list[str]:
    """A line a variant: what is left of it, and the time in full and compact, in microseconds."""
    head = ["trunk", "parameters served", "sub-networks read"]
    for rows in BATCHES:
        head += [f"B={rows} full µs", "compact µs"]
    grid = []
    names = {variant["name"] for variant in routed(data)}
    for variant in data["variants"]:
        name = variant["name"]
        read = by_seed(data, name, "read").mean(axis=0) if name in names else []
        line = [name, f"{by_seed(data, name, 'parameters').mean():,.0f}", " + ".join(f"{count:.1f}" for count in read)]
        for rows in BATCHES:
            for form in (FULL, COMPACT):
                found = times(data, name, form, rows)
                line.append(milliseconds(1e3 * float(found.mean())) if len(found) else "")
        grid.append(line)
    return lay_out(head, grid, markdown)


def show(data: Mapping[str, Any], markdown: bool) -> str:
    """Quality a variant, differences within a kind of SNR, and serving."""
    parts = [_aucs(data, markdown), _differences(data, markdown), _serving(data, markdown), _notes(data)]
    return "\n\n".join("\n".join(part) for part in parts)


def _notes(data: Mapping[str, Any]) -> list[str]:
    """What the tables are about."""
    settings, serving = data["settings"], data["serving"]
    sizes = ", ".join(f"{kind} {count:,} (width {data['widths'][kind]})" for kind, count in data["parameters"].items())
    return [
        f"Test AUC, mean ± standard deviation over {len(settings['seeds'])} seeds; gains are over {data['baseline']}"
        " with the same batches, * where the mean is larger than its standard deviation. Within a kind of SNR the first"
        " weights are the same too.",
        f"{data_note(data)}, {settings['route_rate']:g} for log alpha.",
        f"Parameters of the trunks: {sizes}.",
        "L0: what the expected share of open routes costs, in units of the summed losses. Open routes: at test time,"
        " mean over seeds, and the fewest and the most.",
        f"Serving: means over seeds of medians, {serving['threads']} threads, {serving['date']}.",
    ]


def draw(data: Mapping[str, Any], place: str, path: Path) -> None:
    """Above: AUC a task against the share of open routes. Below: serving time against it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 3)
    for task, axes in enumerate(above):
        _draw_auc(axes, data, task)
        axes.set_title(f"Test AUC: {data['tasks'][task]}")
    for rows, axes in zip(BATCHES, below, strict=True):
        _draw_serving(axes, data, rows)
        axes.set_title(f"Serving {rows:,} row{'' if rows == 1 else 's'}")
        axes.set_xlabel("routes open at test time (%)")
    above[1].set_xlabel("routes open at test time (%); dots that would hide others are moved by up to 4")
    above[0].set_ylabel("AUC: a dot a seed, a bar their mean")
    below[0].set_ylabel("µs of the trunk; a dot a seed")
    for axes in (*above, *below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 108)
    marks: dict[str, Any] = {}
    for axes in (above[0], below[0]):
        handles, labels = axes.get_legend_handles_labels()
        marks.update(zip(labels, handles, strict=True))
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"SNR on 2013 flights from New York, its L0 weight swept. {place}", fontsize=11)
    figure.savefig(path, dpi=130)


def _draw_auc(axes: Any, data: Mapping[str, Any], task: int) -> None:
    for kind in (MMOE, PLE):
        values = by_seed(data, kind, "auc")[:, task]
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        axes.axhline(values.mean(), color=OF_KIND[kind], linewidth=1.8, label=f"{kind}; band: standard deviation")
        axes.axhspan(values.mean() - deviation, values.mean() + deviation, color=OF_KIND[kind], alpha=0.12, linewidth=0)
    for variant in routed(data):
        values = by_seed(data, variant["name"], "auc")[:, task]
        share = 100 * by_seed(data, variant["name"], "open")
        # Variants that keep all routes would hide each other, as the label says.
        share = share + {True: 0, False: 4}[variant["sampled"]] - (2 if variant["kind"] == AVER else 0)
        colour = OF_KIND[variant["kind"]]
        style = {"color": colour} if variant["sampled"] else {"color": colour, "markerfacecolor": "none"}
        label = variant["kind"] + (", more L0 to the left" if variant["sampled"] else ", z not sampled (moved right)")
        axes.plot(share, values, "o", markersize=5, alpha=0.6, label=label, **style)
        axes.hlines(values.mean(), share.mean() - 2, share.mean() + 2, color=colour, linewidth=3)


def _draw_serving(axes: Any, data: Mapping[str, Any], rows: int) -> None:
    for kind in (MMOE, PLE):
        axes.axhline(1e3 * times(data, kind, FULL, rows).mean(), color=OF_KIND[kind], linewidth=1.8)
    for variant in routed(data):
        share = 100 * by_seed(data, variant["name"], "open")
        for form, mark in ((FULL, "x"), (COMPACT, "s")):
            label = f"{variant['kind']}, served {'in full' if form == FULL else 'compact'}"
            values = 1e3 * times(data, variant["name"], form, rows)
            axes.plot(share, values, mark, color=OF_KIND[variant["kind"]], markersize=5, alpha=0.7, label=label)
    axes.set_ylim(bottom=0)
