"""Runs the benchmarks: ``python benchmarks/run.py [SUITE ...] --device cpu|cuda --json FILE --plot DIR``.

Every contender is checked against float64 before it is timed; one that fails is reported as FAILED, has no time and no
speed-up, and makes the exit status 1. The limits that the shares refer to are measured in the same run.

A study is not a table of contenders' times as a suite is, or takes minutes, and runs only where it is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Behind what is installed, so that `benchmarks` is found from a clone and an installed mtlkernels still comes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import compare, plots, report, table  # noqa: E402
from benchmarks.harness.case import Case, Suite  # noqa: E402
from benchmarks.harness.limits import Limits  # noqa: E402
from benchmarks.harness.runner import run  # noqa: E402
from benchmarks.harness.timing import QUICK, Budget  # noqa: E402
from benchmarks.suites import STUDIES, SUITES  # noqa: E402

# On which rows of another run may stand beside those of this one. Versions may differ: a row can say its own.
ALIKE = ("machine", "threads", "budget")
# What makes no sense for a study, which has no rows.
OF_SUITES = ("workload", "dtype", "resume", "compare")


@dataclass
class Measured:
    """A report, what of it this run has measured, and what it is compared with, as that was before the run."""

    found: report.Report
    fresh: dict[str, list[report.Row]] = field(default_factory=dict)
    earlier: report.Report | None = None

    @property
    def failed(self) -> bool:
        """Whether something is wrong, or the machine was so busy that no row of a suite was timed."""
        return self.found.failed or any(rows and all(r.disturbed for r in rows) for rows in self.fresh.values())


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="mtlkernels against what a user would pick instead.")
    p.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"of {', '.join(SUITES)}, which are all run by default, and the studies {', '.join(STUDIES)}",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=(
            "write results; a folder gets a SUITE-MACHINE.json each, with --quick SUITE-MACHINE-quick.json, in which"
            " rows that are not measured stay"
        ),
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="with --json FOLDER: take the rows that are there already, of the same machine, versions and time a row",
    )
    p.add_argument("--plot", type=Path, metavar="DIR", help="write plots (needs matplotlib)")
    p.add_argument("--workload", nargs="+", metavar="NAME", help="only these workloads, such as A A1")
    p.add_argument("--dtype", nargs="+", metavar="NAME", help="only these dtypes, such as float32 bfloat16")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads; PyTorch's choice by default")
    p.add_argument("--quick", action="store_true", help="few rows and little time each: a smoke test")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    p.add_argument("--compare", type=Path, metavar="OLD", help="say what got slower or faster than in a file or folder")
    p.add_argument("--from-json", type=Path, metavar="FILE", help="print and plot earlier results; measure nothing")
    p.add_argument("--retime", action="store_true", help="with --from-json: measure the times in a study again")
    return p


def choose(suite: Suite, options: argparse.Namespace) -> list[Case]:
    """The cases of a suite that the options ask for."""
    return [
        case
        for case in suite.cases(options.device)
        if (not options.workload or case.workload in options.workload)
        and (not options.dtype or case.dtype_name in options.dtype)
        and (case.quick or not options.quick)
    ]


def measure(options: argparse.Namespace) -> Iterator[Measured]:
    """Runs the suites one after another, and gives each as soon as it is there."""
    device = torch.device(options.device)
    budget = QUICK if options.quick else Budget()
    limits = Limits(device)
    names = list(dict.fromkeys(options.suites or SUITES))
    chosen = {name: choose(SUITES[name], options) for name in names if name in SUITES}
    if chosen and not any(chosen.values()):
        raise SystemExit("no rows left: --workload, --dtype and --quick together exclude all of them")
    if options.json and options.json.suffix != ".json":  # what cannot be added to is found before anything is measured
        for name, cases in chosen.items():
            known_rows(name, cases, report.new_report([name], device, budget), options)
    for name in names:
        measured = Measured(report.new_report([name], device, budget))
        if name in STUDIES:
            measured.found.studies[name] = STUDIES[name].run(device, options.quick)
        elif chosen[name]:
            measured.earlier = compared(measured.found, options)  # before the same file gets new rows
            rows = measure_suite(name, chosen[name], measured.found, (device, budget, limits), options)
            measured.fresh = {name: rows}
        else:  # --workload, --dtype or --quick leave nothing of this suite
            continue
        yield measured


def known_rows(name: str, cases: Sequence[Case], found: report.Report, options: argparse.Namespace) -> list[report.Row]:
    """What the folder of results has of a suite, with ``--resume`` and without: rows that are still cases of it."""
    try:
        earlier = report.earlier(found, options.json)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if earlier is None:
        return []
    possible = {case.key for case in SUITES[name].cases(options.device)}
    asked = {case.key for case in cases}
    rows = [row for row in earlier.rows.get(name, []) if row.key in possible]
    others = report.differences(earlier, found, ALIKE)
    if others and any(row.key not in asked for row in rows):
        raise SystemExit(
            f"{options.json / found.file_name} has rows that are not asked for, and is of a run with another"
            f" {' and '.join(others)}, so that these rows cannot stand beside new ones: name another folder with --json"
        )
    return [] if others else report.kept(earlier, found, rows)


def measure_suite(
    name: str,
    cases: list[Case],
    found: report.Report,
    how: tuple[torch.device, Budget, Limits],
    options: argparse.Namespace,
) -> list[report.Row]:
    """Adds a suite's rows to a report; those that it measured.

    Where results go to a folder, each is there as soon as it is measured, and what else the folder had stays.
    """
    device, budget, limits = how
    stored = options.json and options.json.suffix != ".json"
    known = {row.key: row for row in known_rows(name, cases, found, options)} if stored else {}
    earlier = report.earlier(found, options.json) if known else None
    if earlier and earlier.limits and (options.resume or known.keys() - {case.key for case in cases}):
        report.raise_limits(limits, earlier.limits)  # which rows that stay are held against
    order = {case.key: i for i, case in enumerate(SUITES[name].cases(options.device))}

    def keep(rows: list[report.Row]) -> None:
        known.update((row.key, row) for row in rows if row.key not in known or not known[row.key].outlasts(row))
        found.rows[name] = sorted(known.values(), key=lambda row: order.get(row.key, len(order)))
        found.limits = report.limits_as_json(limits)
        if stored:
            report.save(found, options.json)

    def arrived(row: report.Row) -> None:
        if row.key in known and known[row.key].outlasts(row):
            print(f"  the machine was busy: the times of {known[row.key].date} stay", file=sys.stderr, flush=True)
        keep([row])

    def wanted(case: Case) -> bool:
        row = known.get(case.key) if options.resume else None
        return row is None or row.disturbed or bool(row.versions)  # or of other versions

    rows = run([case for case in cases if wanted(case)], device, budget, limits, arrived)
    keep(rows)  # once more, with limits that have risen
    return rows


def retime(found: report.Report, device: torch.device) -> None:
    """Measures the times in earlier studies again, and keeps what else they found."""
    for name, data in found.studies.items():
        again = STUDIES[name].retime
        if again:
            found.studies[name] = again(device, data)


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    unknown = sorted(set(options.suites) - set(SUITES) - set(STUDIES))
    if unknown:
        p.error(f"no suite {', '.join(unknown)}; there are {', '.join([*SUITES, *STUDIES])}")
    check_options(p, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    failed = False
    reports: list[report.Report] = []
    for measured in earlier_results(options) if options.from_json else measure(options):
        reports.append(measured.found)
        written = None
        if options.json:
            one = options.json.suffix == ".json"
            written = report.save(report.merged(reports) if one else measured.found, options.json)
        show(measured, options, written)
        failed |= measured.failed
    return int(failed)


def check_options(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what would fail after minutes of measuring, or would not be heeded."""
    if options.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch finds no GPU")
    if options.resume and (options.json is None or options.json.suffix == ".json"):
        p.error("--resume: there is no folder of results; name it with --json")
    if options.retime and not options.from_json:
        p.error("--retime: no earlier results; name them with --from-json")
    if options.threads is not None and options.threads < 1:
        p.error(f"--threads: must be 1 or more, got {options.threads}")
    studies = [name for name in options.suites if name in STUDIES]
    given = [f"--{name}" for name in OF_SUITES if getattr(options, name)]
    if studies and given:
        p.error(f"{', '.join(given)}: a study has no rows to choose or to compare, and {', '.join(studies)} is one")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot: matplotlib is not installed")
    one = options.json and options.json.suffix == ".json"
    for name, folder in (("--json", options.json.parent if one else options.json), ("--plot", options.plot)):
        if folder and (reason := unwritable(folder)):
            p.error(f"{name}: cannot write to {folder}: {reason}")
    if one and options.quick and options.json.is_file() and not report.load(options.json).quick:
        p.error(f"--json: {options.json} is no smoke test's, which --quick would put in its place")


def unwritable(folder: Path) -> str:
    """Why no file can be made in a folder, which is made if need be; "" where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def earlier_results(options: argparse.Namespace) -> Iterator[Measured]:
    """Those of --from-json, of which --retime measures the times in studies again."""
    found = report.load(options.from_json)
    if options.retime:
        retime(found, torch.device(options.device))
    yield Measured(found, found.rows, compared(found, options))


def compared_file(found: report.Report, options: argparse.Namespace) -> Path:
    """The file that --compare names for a report."""
    old: Path = options.compare
    return old / found.file_name if old.is_dir() else old


def compared(found: report.Report, options: argparse.Namespace) -> report.Report | None:
    """What --compare names, if it is there."""
    if not options.compare:
        return None
    file = compared_file(found, options)
    return report.load(file) if file.is_file() else None


def show(measured: Measured, options: argparse.Namespace, written: Path | None) -> None:
    """Prints a report, compares what was measured, and plots."""
    found = measured.found
    for name, rows in found.rows.items():
        print(f"\n{SUITES[name].title}\n")
        print(table.markdown(rows) if options.markdown else table.text(rows))
        kernels = table.kernels(rows)
        if kernels:
            print(f"\nOur kernels, one launch a line:\n\n{kernels}")
    for name, data in found.studies.items():
        print(f"\n{STUDIES[name].title}\n")
        print(STUDIES[name].show(data, options.markdown))
    print(f"\n{table.machine(found)}")
    if options.compare:
        if measured.earlier:
            print(f"\n{compare.text(measured.earlier, dataclasses.replace(found, rows=measured.fresh))}")
        else:
            print(f"\nnothing to compare with: there is no {compared_file(found, options)}")
    if written:
        print(f"wrote {written}")
    if options.plot:
        for name, rows in found.rows.items():
            for path in plots.draw(SUITES[name], rows, found, options.plot):
                print(f"wrote {path}")
        for name in found.studies:
            print(f"wrote {plots.draw_study(STUDIES[name], found, options.plot)}")


if __name__ == "__main__":
    sys.exit(main())
