"""Rewrites the tables of README and of the site from the results that are kept: ``python -m benchmarks.readme``.

In README or a page of ``docs`` a table stands between ``<!-- table: NAME from FILE.json -->`` and ``<!-- /table -->``;
everything between them is made of that file. NAME is one of :data:`TABLES`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import plots, report
from benchmarks.harness.case import OURS, amount
from benchmarks.harness.report import Report, Row
from benchmarks.harness.table import milliseconds
from benchmarks.serving.contenders import OWN, PACKAGED
from benchmarks.serving.models import MODELS
from benchmarks.suites import convert, pcgrad, pcgrad_step, serving, snr

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_TABLE = re.compile(r"<!-- table: (\S+) from (\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?table\b")

LEVELS = {
    "A1": "A1: one level, serving",
    "A": "A: one level",
    "A2": "A2: PLE, two levels",
    "B": "B: PLE, two levels",
    "A-batch": "A: one level, few rows",
}


@dataclass(frozen=True)
class Column:
    """A heading, and the text below it in each row."""

    heading: str
    cell: Callable[[Row], str]
    right: bool = True


def _words(heading: str, cell: Callable[[Row], str]) -> Column:
    return Column(heading, cell, right=False)


def _time(heading: str, name: str) -> Column:
    """Median milliseconds; a dash where the contender was left out or refused."""

    def cell(row: Row) -> str:
        timing = row.timing(name)
        text = milliseconds(timing.median) if timing else "–"
        return f"**{text}**" if timing and name == OURS else text

    return Column(f"{heading}, ms", cell)


def _speedup(heading: str, over: str, bold: bool = False) -> Column:
    """How many times as fast mtlkernels is."""

    def cell(row: Row) -> str:
        value = row.speedup(over)
        if value is None:
            return "–"
        text = f"{value:.0f}×" if value >= 100 else f"{value:#.3g}×"
        return f"**{text}**" if bold else text

    return Column(heading, cell)


def _share(row: Row) -> str:
    value = row.share_of_limit(OURS)
    return "–" if value is None else f"{100 * value:.0f}%"


def _share_of_read(row: Row) -> str:
    """Of the faster of the reads that took turns with the call."""
    found = [value for name in pcgrad.READS if (value := row.speedup(name)) is not None]
    return f"{100 * min(found):.0f}%" if found else "–"


def _gradients(row: Row) -> str:
    tasks = f"{row.size['T']} tasks, "
    if row.workload == "C-sparse":
        count, width = pcgrad.TABLE
        return f"{tasks}sparse: an embedding of {amount(count)} × {width}, {pcgrad.TOUCHED:,} draws each"
    return f"{tasks}{amount(row.size['P'])} {row.dtype} in {row.size['tensors']} tensors"


def _peaks(baseline: str, heading: str) -> Column:
    """The most memory that a call holds, the baseline's and ours."""

    def cell(row: Row) -> str:
        before, after = (row.outcomes[name].peak for name in (baseline, OURS))
        return "–" if before is None or after is None else f"{before:,.0f} → {after:,.0f} MiB"

    return Column(f"peak memory, {heading} → ours", cell)


def _pcgrad_shown(row: Row) -> bool:
    """Of the sweep over tasks only its smallest row."""
    return row.workload != "C-tasks" or row.size["T"] == min(pcgrad.TASK_SWEEP)


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


# What a reader asks first of the suite mixture: the rows of each line of the table "gains".
_GAINS: dict[str, Callable[[Row], bool]] = {
    "serving, 1 to 256 rows": lambda row: row.work == "forward" and row.size["B"] <= 256,
    "serving, 4,096 rows": lambda row: row.work == "forward" and row.size["B"] == 4096,
    "training, 1 and 16 rows": lambda row: row.work == "forward+backward" and row.size["B"] <= 16,
    "training, 256 and 1,024 rows": lambda row: row.work == "forward+backward" and row.size["B"] in (256, 1024),
    "training, 4,096 rows": lambda row: row.work == "forward+backward" and row.size["B"] == 4096,
}


def _gains(found: Report) -> list[str]:
    """The smallest and the largest speed-up of each kind of call, over all workloads."""
    rows = found.rows.get("mixture", [])
    columns = [(dtype, over) for dtype in ("float32", "bfloat16") for over in ("eager", "compile")]
    names = {"eager": "eager modules", "compile": "torch.compile"}
    lines = [["", *(f"{dtype}, over {names[over]}" for dtype, over in columns)], ["---", *["---:"] * len(columns)]]
    for words, belongs in _GAINS.items():
        cells = []
        for dtype, over in columns:
            chosen = [row.speedup(over) for row in rows if row.dtype == dtype and belongs(row)]
            gains = [gain for gain in chosen if gain is not None]
            if not gains:
                raise ValueError(f"the suite mixture has no rows to show of {words} in {dtype}")
            low, high = (f"{gain:#.2g}".rstrip(".") for gain in (min(gains), max(gains)))
            cells.append(f"{low}×" if low == high else f"{low} to {high}×")
        lines.append([words, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _machine(found: Report) -> list[str]:
    """Where and when, and what that machine does at best."""
    limits = found.limits
    reads = f"{limits['read_gb_s']:.3g} GB/s, from cache {limits['resident_read_gb_s']:.3g} GB/s"
    return [f"{plots.where(found)}.", f"Measured in the same run: {report.rates(limits)}; reading {reads}."]


def _serving(found: Report) -> list[str]:
    """Medians on all threads, in milliseconds."""
    study = found.studies["serving"]
    most = max(row["threads"] for row in study["rows"])
    columns = {
        "modules, eager": ("eager",),
        "modules, torch.compile": ("compile", "frozen"),
        "modules, AOTInductor": ("packaged",),
        f"ONNX Runtime {study['versions']['onnxruntime']}": ("onnxruntime",),
        f"OpenVINO {study['versions']['openvino']}": ("openvino",),
        "mtlkernels": (OURS,),
        "mtlkernels, AOTInductor": (PACKAGED,),
    }
    heads = ["model", "dtype", "rows", *(f"{name}, ms" for name in columns), "vs the better runtime"]
    lines = [heads, ["---", "---", *["---:"] * (len(columns) + 2)]]
    for row in study["rows"]:
        if row["threads"] != most or row["clients"] != 1:
            continue
        cells = []
        for contenders in columns.values():
            known = [row["p50"][contender] for contender in contenders if contender in row["p50"]]
            text = milliseconds(min(known) / 1e3) if known else "–"
            cells.append(f"**{text}**" if known and set(contenders) <= set(OWN) else text)
        gain = serving.gain(row)
        ratio = "–" if gain is None else f"**{gain:.2f}×**"
        lines.append([MODELS[row["model"]].label, row["dtype"], str(row["rows"]), *cells, ratio])
    return [f"{plots.where(found)}.", "", *(f"| {' | '.join(line)} |" for line in lines)]


def _snr(workload: str, *last: Column) -> Table:
    """The rows of a kind of SNR."""
    columns = (
        Column(f"open routes of {snr.RouteShape().below} an output", lambda row: str(row.size["open"])),
        _words("work", lambda row: row.work),
        _words("dtype", lambda row: row.dtype),
        _time("a product a route", "eager"),
        _time("torch.compile", "compile"),
        _time("folded GEMM", "folded"),
        _time("mtlkernels", OURS),
        *last,
    )
    return Table("snr", columns, lambda row: row.workload == workload)


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
            _words("workload", lambda row: LEVELS[row.workload]),
            Column("rows", lambda row: str(row.size["B"])),
            _words("work", lambda row: row.work),
            _words("dtype", lambda row: row.dtype),
            _time("eager modules", "eager"),
            _time("torch.compile", "compile"),
            _time("hand-batched", "batched"),
            _time("mtlkernels", OURS),
            _speedup("vs eager", "eager", bold=True),
            _speedup("vs compile", "compile"),
            Column("as one GEMM, ms", lambda row: "–" if row.gemm_ms is None else milliseconds(row.gemm_ms)),
            Column("of the limit", _share),
            _peaks("eager", "eager"),
        ),
        lambda row: row.workload in LEVELS,
    ),
    "pcgrad": Table(
        "pcgrad",
        (
            _words("gradients", _gradients),
            _time("the usual PCGrad", pcgrad.USUAL),
            _time("pytorch-optimizer 4.1.0", pcgrad.OPTIMIZER),
            _time("TorchJD 0.18", pcgrad.TORCHJD),
            _time("mtlkernels", OURS),
            _speedup("vs usual", pcgrad.USUAL, bold=True),
            _speedup("vs TorchJD", pcgrad.TORCHJD),
            Column("of a read in turns", _share_of_read),
            Column("of the limit", _share),
            _peaks(pcgrad.USUAL, "usual"),
        ),
        _pcgrad_shown,
    ),
    "pcgrad-step": Table(
        "pcgrad-step",
        (
            Column("tasks", lambda row: str(row.size["T"])),
            Column("levels", lambda row: str(row.size["levels"])),
            Column("rows", lambda row: str(row.size["B"])),
            _words("dtype", lambda row: row.dtype),
            _time("modules, the usual PCGrad", pcgrad_step.USUAL),
            _time("modules, pytorch-optimizer 4.1.0", pcgrad_step.OPTIMIZER),
            _time("modules, TorchJD 0.18", pcgrad_step.TORCHJD),
            _time("modules, `mk.optim.PCGrad`", pcgrad_step.MODULES),
            _time("fused, `mk.optim.PCGrad`", OURS),
            _speedup("vs usual", pcgrad_step.USUAL, bold=True),
            _speedup("vs TorchJD", pcgrad_step.TORCHJD),
            _speedup("vs modules", pcgrad_step.MODULES, bold=True),
            _time("floor: modules, plain sum", pcgrad_step.SUM),
            _time("floor: fused, plain sum", pcgrad_step.FUSED_SUM),
            _peaks(pcgrad_step.USUAL, "usual"),
        ),
    ),
    "convert": Table(
        "convert",
        (
            _words("model", lambda row: _LIBRARY_MODELS[row.workload]),
            _words("work", lambda row: row.work),
            Column("rows", lambda row: str(row.size["B"])),
            _time("as it is", "eager"),
            _time("torch.compile", "compile"),
            _time("converted", OURS),
            _time("converted, torch.compile", "ours-compile"),
            _speedup("vs as it is", "eager", bold=True),
            _speedup("vs compile", "compile"),
        ),
        lambda row: row.work in (convert.TRAINING, convert.SERVING),
    ),
    "snr": _snr("D", _speedup("vs folded", "folded", bold=True), Column("of the limit", _share)),
    "snr-aver": _snr("D-aver", _speedup("vs folded", "folded"), _speedup("vs compile", "compile", bold=True)),
    "serving": _serving,
}


def rewritten(text: str, root: Path = ROOT) -> str:
    """``text`` with each of its tables made anew; files are looked for below ``root``.

    Raises:
        ValueError: a mark is not one of a pair, or there is no such table, file, or row.
    """

    def table(match: re.Match[str]) -> str:
        name, file, _ = match.groups()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        if not (root / file).is_file():
            raise ValueError(f"table {name}: there is no file {file}")
        lines = TABLES[name](report.load(root / file))
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
