"""Serving on a CPU: latency at one thread and at all, and throughput with a client a core, against serving runtimes.

One level and a PLE of two of workload A, and torch-rechub's PLE with embeddings and towers; per-expert modules eager,
compiled, and frozen with max-autotune; ONNX Runtime, OpenVINO (with its hint for bfloat16), both with the static shape
of a row's inputs; and this package, as it is dropped in, as a copy by ``mk.prepare``, and for the library's model
compiled around it, and packaged by AOTInductor as its modules are too. Each runs in a process of its own and is checked
against float64; all are timed in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.case import Study
from benchmarks.harness.report import BUSY, FAILED
from benchmarks.serving import compare
from benchmarks.serving.contenders import CONTENDERS, OURS, PREPARED, STATIC, Load, versions
from benchmarks.serving.gains import VS_RUNTIMES, over_runtimes
from benchmarks.serving.models import MODELS

DTYPES = ("float32", "bfloat16")
ROWS = (1, 16, 64, 256, 4096)
ROUNDS, SECONDS = 6, 0.1


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    if device.type != "cpu":
        raise SystemExit("the suite serving is for CPUs")
    models, dtypes, rows = tuple(MODELS), DTYPES, ROWS
    if quick:
        models, dtypes, rows = ("level",), DTYPES[:1], (1, 16)
    threads = torch.get_num_threads()
    loads = [Load(1), *([Load(threads), Load(1, threads)] if threads > 1 else [])]
    found: dict[str, Any] = {"versions": versions(), "rows": []}
    for model in models:
        for dtype in (dtype for dtype in dtypes if dtype in MODELS[model].dtypes):
            for load in loads[:1] if quick else loads:
                with compare.processes(model, dtype, load, _names(model, dtype, load, quick)) as workers:
                    for count in rows:
                        print(f"serving {model} {dtype} {load} B={count}", file=sys.stderr, flush=True)
                        key = {"model": model, "dtype": dtype, "rows": count}
                        rounds, seconds = (2, 0.02) if quick else (ROUNDS, SECONDS)
                        found["rows"].append(compare.row(workers, key, load, rounds, seconds))
    return found


def _names(model: str, dtype: str, load: Load, quick: bool) -> list[str]:
    names = compare.names_for(model, dtype, load == Load(torch.get_num_threads()))
    return [name for name in names if name in ("eager", OURS, PREPARED)] if quick else names


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row.get("p50", row.get("calls_a_second", {})):
        status = row["unavailable"].get(name, "").partition(":")[0]
        return status if status in (FAILED, BUSY) else "–"
    if "p50" in row:
        # Files without the number of calls have percentiles that may be beyond the slowest of a few.
        slow = f"{row['p99'][name]:,.0f}" if "calls" in row and name in row["p99"] else "–"
        return f"{row['p50'][name]:,.0f} / {slow}"
    return f"{row['calls_a_second'][name]:,.0f}"


def table(rows: Sequence[Mapping[str, Any]], file: Sequence[Mapping[str, Any]]) -> str:
    """Medians and 99th percentiles in microseconds, or calls a second, a row each, in Markdown; ``file``: all rows."""
    names = [name for name in CONTENDERS if any(_cell(row, name) != "–" for row in rows)]
    lines = [f"| model | dtype | threads × clients | rows | {' | '.join(names)} | {VS_RUNTIMES} |"]
    lines.append("|---|---|---|---:|" + "---:|" * (len(names) + 1))
    for row in rows:
        ratio = over_runtimes(row, file)
        cells = [_cell(row, name) for name in names] + ["–" if ratio is None else f"{ratio:.2f}×"]
        load = f"{row['threads']} × {row['clients']}"
        head = f"{MODELS[row['model']].label} | {row['dtype']} | {load} | {row['rows']}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(found: Mapping[str, Any], markdown: bool) -> str:
    rows = found["rows"]
    parts = []
    for words, own in (
        (
            f"Latency, p50 / p99 in µs, p99 of {compare.CALLS_FOR_P99} calls and more",
            [row for row in rows if "p50" in row],
        ),
        ("Calls a second of all clients", [row for row in rows if "p50" not in row]),
    ):
        if own:
            parts.append(f"{words}\n\n{table(own, rows)}")
    places = [
        f"{row['model']} {row['dtype']} B={row['rows']} {name}: {reason}"
        for row in rows
        for name, reason in row["unavailable"].items()
    ]
    named = "; ".join(f"{name}: {contender.label}" for name, contender in CONTENDERS.items())
    runtimes = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    if all(row.get("runtimes") == STATIC for row in rows):
        runtimes += f", with {STATIC}"
    return "\n\n".join([*parts, f"{named}. {runtimes}.", *places])


def draw(found: Mapping[str, Any], place: str, path: Path) -> None:
    """How many times as fast as the better of the two runtimes, each on its better number of threads, against rows.

    A panel a dtype; this package is on all threads.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if "p50" in row]
    most = max(row["threads"] for row in rows)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(5 * len(dtypes) + 1, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model and row["dtype"] == dtype and row["threads"] == most]
            points = [(row["rows"], value) for row in own if (value := over_runtimes(row, found["rows"])) is not None]
            axes.plot([at for at, _ in points], [value for _, value in points], "o-", label=MODELS[model].label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="rows", title=dtype)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("times as fast as the better runtime")
    panels[0].legend(frameon=False)
    figure.suptitle(
        f"Serving against ONNX Runtime and OpenVINO, each on its better number of threads\n{place}", fontsize=11
    )
    figure.savefig(path, dpi=110)


STUDY = Study(
    name="serving",
    title="Serving against ONNX Runtime, OpenVINO and torch.compile",
    run=run,
    show=show,
    draw=draw,
)
