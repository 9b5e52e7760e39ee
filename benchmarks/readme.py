"""Rewrites the tables of README and of the site from the results that are kept: ``python -m benchmarks.readme``.

In README or a page of ``docs`` a table stands between ``<!-- table: NAME from FILE.json -->`` and ``<!-- /table -->``;
everything between them is made of that file. NAME is one of :data:`TABLES`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import columns, plots, report
from benchmarks.harness.case import OURS, amount
from benchmarks.harness.columns import Column, Table
from benchmarks.harness.report import Report, Row
from benchmarks.harness.table import milliseconds
from benchmarks.serving.contenders import OWN, PACKAGED, STATIC
from benchmarks.serving.gains import VS_RUNTIMES, over_runtimes
from benchmarks.serving.models import MODELS
from benchmarks.suites import convert, mixture, pcgrad, pcgrad_step, snr

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_TABLE = re.compile(r"<!-- table: (\S+) from (\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?table\b")

# Of the suite mixture and of serving.
COMPILED, BETTER = ("compile", mixture.FROZEN), "torch.compile, the better of default and frozen"
LEVELS = {
    "A1": "A1: one level, serving",
    "A": "A: one level",
    "A2": "A2: PLE, two levels",
    "B": "B: PLE, two levels",
    "A-batch": "A: one level, few rows",
}


def _share_of_read(row: Row) -> str:
    """Of the faster of the reads that took turns with the call."""
    found = [value for name in pcgrad.READS if (value := row.speedup(name)) is not None]
    return f"{100 * min(found):.0f}%" if found else "–"


def _gradients(row: Row) -> str:
    tasks = f"{row.size['T']} tasks, "
    if row.workload == "C-sparse":
        count, width = pcgrad.TABLE
        how = "" if pcgrad.TOUCHED_ROWS in row.outcomes else ", which the usual PCGrad makes dense"
        return f"{tasks}sparse: an embedding of {amount(count)} × {width}, {pcgrad.TOUCHED:,} draws each{how}"
    return f"{tasks}{amount(row.size['P'])} {row.dtype} in {row.size['tensors']} tensors"


def _pcgrad_shown(row: Row) -> bool:
    """Of the sweep over tasks only its smallest row."""
    return row.workload != "C-tasks" or row.size["T"] == min(pcgrad.TASK_SWEEP)


# What a reader asks first of the suite mixture: the rows of each line of the table "gains".
_GAINS: dict[str, Callable[[Row], bool]] = {
    "serving, 1 to 256 rows": lambda row: row.work == "forward" and row.size["B"] <= 256,
    "serving, 4,096 rows": lambda row: row.work == "forward" and row.size["B"] == 4096,
    "training, 1 and 16 rows": lambda row: row.work == "forward+backward" and row.size["B"] <= 16,
    "training, 64 to 1,024 rows": lambda row: row.work == "forward+backward" and 64 <= row.size["B"] <= 1024,
    "training, 4,096 rows": lambda row: row.work == "forward+backward" and row.size["B"] == 4096,
}


def _gains(found: Report) -> list[str]:
    """The smallest and the largest speed-up of each kind of call, over all workloads.

    Raises:
        ValueError: a line has no rows, or one without a time of ours or of whom we are held against; without that
            row the line could only look better.
    """
    rows = found.rows.get("mixture", [])
    over = {"eager modules": ("eager",), "torch.compile": COMPILED}
    kinds = [(dtype, words) for dtype in ("float32", "bfloat16") for words in over]
    lines = [["", *(f"{dtype}, over {words}" for dtype, words in kinds)], ["---", *["---:"] * len(kinds)]]
    for line, belongs in _GAINS.items():
        cells = []
        frozen = all(mixture.FROZEN in row.outcomes for row in rows if belongs(row))
        for dtype, words in kinds:
            chosen = [row for row in rows if row.dtype == dtype and belongs(row)]
            if not chosen:
                raise ValueError(f"the suite mixture has no rows to show of {line} in {dtype}")
            gains = [_known_gain(row, over[words]) for row in chosen]
            low, high = (f"{gain:#.2g}".rstrip(".") for gain in (min(gains), max(gains)))
            cells.append(f"{low}×" if low == high else f"{low} to {high}×")
        lines.append([f"{line} (compiled: the better of default and frozen)" if frozen else line, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _known_gain(row: Row, over: Sequence[str]) -> float:
    gain = columns.gain(row, over)
    if gain is None:
        why = "; ".join(
            f"{name} is {outcome.status}"
            for name, outcome in row.outcomes.items()
            if name in (OURS, *over) and outcome.timing is None
        )
        raise ValueError(f"gains: {row.title} has no speed-up over {' or '.join(over)}: {why}; measure it again")
    return gain


def _machine(found: Report) -> list[str]:
    """Where and when, and what that machine does at best."""
    limits = found.limits
    reads = f"{limits['read_gb_s']:.3g} GB/s, from cache {limits['resident_read_gb_s']:.3g} GB/s"
    return [f"{plots.where(found)}.", f"Measured in the same run: {report.rates(limits)}; reading {reads}."]


def _compile_name(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the column of torch.compile has: of each model the better of two ways, where each was served in both."""
    served = {way: {row["model"] for row in rows if way in row.get("p50", {}) | row["unavailable"]} for way in COMPILED}
    return BETTER if served["compile"] == served["frozen"] else "torch.compile"


def _serving(found: Report) -> list[str]:
    """Medians on all threads, in milliseconds."""
    study = found.studies["serving"]
    most = max(row["threads"] for row in study["rows"])
    shapes = f", {STATIC}" if all(row.get("runtimes") == STATIC for row in study["rows"]) else ""
    shown = {
        "modules, eager": ("eager",),
        f"modules, {_compile_name(study['rows'])}": COMPILED,
        "modules, AOTInductor": ("packaged",),
        f"ONNX Runtime {study['versions']['onnxruntime']}{shapes}": ("onnxruntime",),
        f"OpenVINO {study['versions']['openvino']}{shapes}": ("openvino",),
        "mtlkernels": (OURS,),
        "mtlkernels, AOTInductor": (PACKAGED,),
    }
    heads = ["model", "dtype", "rows", *(f"{name}, ms" for name in shown), VS_RUNTIMES]
    lines = [heads, ["---", "---", *["---:"] * (len(shown) + 2)]]
    for row in study["rows"]:
        if row["threads"] != most or row["clients"] != 1:
            continue
        cells = []
        for contenders in shown.values():
            known = [row["p50"][contender] for contender in contenders if contender in row["p50"]]
            text = milliseconds(min(known) / 1e3) if known else "–"
            cells.append(f"**{text}**" if known and set(contenders) <= set(OWN) else text)
        gain = over_runtimes(row, study["rows"])
        ratio = "–" if gain is None else f"**{gain:.2f}×**"
        lines.append([MODELS[row["model"]].label, row["dtype"], str(row["rows"]), *cells, ratio])
    return [f"{plots.where(found)}.", "", *(f"| {' | '.join(line)} |" for line in lines)]


def _snr(workload: str, *last: Column) -> Table:
    """The rows of a kind of SNR."""
    shown = (
        Column(f"open routes of {snr.RouteShape().below} an output", lambda row: str(row.size["open"])),
        columns.words("work", lambda row: row.work),
        columns.words("dtype", lambda row: row.dtype),
        columns.time("a product a route", "eager"),
        columns.time("torch.compile", "compile"),
        columns.time("folded GEMM", "folded"),
        columns.time("folded, open routes alone", snr.OPEN_ALONE),
        columns.time("folded, open routes alone, torch.compile", snr.OPEN_ALONE_COMPILED),
        columns.time("mtlkernels", OURS),
        *last,
    )
    return Table("snr", shown, lambda row: row.workload == workload)


# The faster of the two that leave closed routes out, in files that have them.
_VS_OPEN_ALONE = columns.speedup("vs open routes alone", snr.OPEN_ALONE, snr.OPEN_ALONE_COMPILED, bold=True)

# Of sparse gradients both ways to write it.
_USUAL = (pcgrad.USUAL, pcgrad.TOUCHED_ROWS)

_LIBRARY_MODELS = {
    "rechub-PLE": "torch-rechub's PLE",
    "rechub-MMOE": "torch-rechub's MMOE",
    "rechub-PLE-PReLU": "torch-rechub's PLE, PReLU",
    "rechub-PLE-Dice": "torch-rechub's PLE, Dice",
    "deepctr-PLE": "deepctr-torch's PLE",
    "deepctr-PLE-BN": "deepctr-torch's PLE, batch norm",
}

TABLES: dict[str, Callable[[Report], list[str]]] = {
    "machine": _machine,
    "gains": _gains,
    "mixture": Table(
        "mixture",
        (
            columns.words("workload", lambda row: LEVELS[row.workload]),
            Column("rows", lambda row: str(row.size["B"])),
            columns.words("work", lambda row: row.work),
            columns.words("dtype", lambda row: row.dtype),
            columns.time("eager modules", "eager"),
            columns.time("torch.compile", *COMPILED, called={mixture.FROZEN: mixture.FROZEN}),
            columns.time("hand-batched", "batched"),
            columns.time("mtlkernels", OURS),
            columns.speedup("vs eager", "eager", bold=True),
            columns.speedup("vs compile", *COMPILED),
            Column("as one GEMM, ms", lambda row: "–" if row.gemm_ms is None else milliseconds(row.gemm_ms)),
            Column("of the limit", columns.share),
            columns.peaks("eager", "eager"),
        ),
        lambda row: row.workload in LEVELS,
    ),
    "pcgrad": Table(
        "pcgrad",
        (
            columns.words("gradients", _gradients),
            columns.time("the usual PCGrad", *_USUAL, called={pcgrad.TOUCHED_ROWS: "on touched rows"}),
            columns.time("pytorch-optimizer 4.1.0", pcgrad.OPTIMIZER),
            columns.time("TorchJD 0.18", pcgrad.TORCHJD),
            columns.time("mtlkernels", OURS),
            columns.speedup("vs usual", *_USUAL, bold=True),
            columns.speedup("vs TorchJD", pcgrad.TORCHJD),
            Column("of a read in turns", _share_of_read),
            Column("of the limit", columns.share),
            columns.peaks(pcgrad.USUAL, "usual"),
        ),
        _pcgrad_shown,
    ),
    "pcgrad-step": Table(
        "pcgrad-step",
        (
            Column("tasks", lambda row: str(row.size["T"])),
            Column("levels", lambda row: str(row.size["levels"])),
            Column("rows", lambda row: str(row.size["B"])),
            columns.words("dtype", lambda row: row.dtype),
            columns.time("modules, the usual PCGrad", pcgrad_step.USUAL),
            columns.time("modules, pytorch-optimizer 4.1.0", pcgrad_step.OPTIMIZER),
            columns.time("modules, TorchJD 0.18", pcgrad_step.TORCHJD),
            columns.time("modules, `mk.optim.PCGrad`", pcgrad_step.MODULES),
            columns.time("fused, `mk.optim.PCGrad`", OURS),
            columns.speedup("vs usual", pcgrad_step.USUAL, bold=True),
            columns.speedup("vs TorchJD", pcgrad_step.TORCHJD),
            columns.speedup("vs modules", pcgrad_step.MODULES, bold=True),
            columns.time("floor: modules, plain sum", pcgrad_step.SUM),
            columns.time("floor: fused, plain sum", pcgrad_step.FUSED_SUM),
            columns.peaks(pcgrad_step.USUAL, "usual"),
        ),
    ),
    "convert": Table(
        "convert",
        (
            columns.words("model", lambda row: _LIBRARY_MODELS[row.workload]),
            columns.words("work", lambda row: row.work),
            columns.words("dtype", lambda row: row.dtype),
            Column("rows", lambda row: str(row.size["B"])),
            columns.time("as it is", "eager"),
            columns.time("torch.compile", "compile"),
            columns.time("converted", OURS),
            columns.time("converted, torch.compile", "ours-compile"),
            columns.speedup("vs as it is", "eager", bold=True),
            columns.speedup("vs compile", "compile"),
        ),
        lambda row: row.work in (convert.TRAINING, convert.SERVING),
    ),
    "snr": _snr(
        "D", columns.speedup("vs folded", "folded", bold=True), _VS_OPEN_ALONE, Column("of the limit", columns.share)
    ),
    "snr-aver": _snr(
        "D-aver",
        columns.speedup("vs folded", "folded"),
        _VS_OPEN_ALONE,
        columns.speedup("vs compile", "compile", bold=True),
    ),
    "serving": _serving,
}


def rewritten(text: str, root: Path = ROOT) -> str:
    """``text`` with each of its tables made anew; files are looked for below ``root``.

    Raises:
        ValueError: a mark is not one of a pair, or there is no such table, file, or row, or a file is of a smoke test.
    """

    def table(match: re.Match[str]) -> str:
        name, file, _ = match.groups()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        if not (root / file).is_file():
            raise ValueError(f"table {name}: there is no file {file}")
        found = report.load(root / file)
        if found.quick:
            raise ValueError(f"table {name}: {file} is of a run with --quick, a smoke test; measure it again without")
        lines = TABLES[name](found)
        return "\n".join([f"<!-- table: {name} from {file} -->", "", *lines, "", "<!-- /table -->"])

    pairs = _TABLE.findall(text)
    if any(_MARK.search(inside) for *_, inside in pairs) or len(_MARK.findall(text)) != 2 * len(pairs):
        raise ValueError("each '<!-- table: NAME from FILE -->' must be followed by its own '<!-- /table -->'")
    return _TABLE.sub(table, text)


def main() -> int:
    for page in PAGES:
        before = page.read_text()
        after = rewritten(before)
        if found := len(_TABLE.findall(after)):
            page.write_text(after)
            state = "as they were" if after == before else "made anew"
            print(f"{page.relative_to(ROOT)}: {found} {'table' if found == 1 else 'tables'} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
