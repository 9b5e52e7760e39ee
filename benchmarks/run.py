"""Runs the benchmarks: ``python benchmarks/run.py [SUITE ...] --device cpu|cuda --json FILE --plot DIR``.

Every contender is checked against float64 before it is timed; one that fails is reported as FAILED, has no time and no
speed-up, and makes the exit status 1. The limits that the shares refer to are measured in the same run.

A study is not a table of contenders' times as a suite is, or takes minutes, and runs only where it is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
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


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="mtlkernels against what a user would pick instead.")
    p.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"of {', '.join(SUITES)}, which are all run by default, and the studies {', '.join(STUDIES)}",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--json", type=Path, metavar="FILE", help="write results; a folder gets a SUITE-MACHINE.json each")
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


def measure(options: argparse.Namespace) -> Iterator[report.Report]:
    """Runs the suites one after another, and gives a report of each as soon as it is there."""
    device = torch.device(options.device)
    budget = QUICK if options.quick else Budget()
    limits = Limits(device)
    names = list(dict.fromkeys(options.suites or SUITES))
    chosen = {name: choose(SUITES[name], options) for name in names if name in SUITES}
    if chosen and not any(chosen.values()):
        raise SystemExit("no rows left: --workload, --dtype and --quick together exclude all of them")
    for name in names:
        found = report.new_report([name], device, budget)
        if name in STUDIES:
            found.studies[name] = STUDIES[name].run(device, options.quick)
        elif chosen[name]:
            measure_suite(name, chosen[name], found, (device, budget, limits), options)
        else:  # --workload, --dtype or --quick leave nothing of this suite
            continue
        yield found


def measure_suite(
    name: str,
    cases: list[Case],
    found: report.Report,
    how: tuple[torch.device, Budget, Limits],
    options: argparse.Namespace,
) -> None:
    """Adds a suite's rows to a report. Where results go to a folder, each is there as soon as it is measured."""
    device, budget, limits = how
    stored = options.json and options.json.suffix != ".json"
    earlier = report.earlier(found, options.json) if stored and options.resume else None
    known = {row.key: row for row in earlier.rows.get(name, [])} if earlier else {}
    if earlier and earlier.limits:
        report.raise_limits(limits, earlier.limits)
    order = {case.key: i for i, case in enumerate(SUITES[name].cases(options.device))}

    def keep(rows: list[report.Row]) -> None:
        known.update((row.key, row) for row in rows)
        found.rows[name] = sorted(known.values(), key=lambda row: order.get(row.key, len(order)))
        found.limits = report.limits_as_json(limits)
        if stored:
            report.save(found, options.json)

    again = [case for case in cases if case.key not in known or known[case.key].disturbed]
    keep(run(again, device, budget, limits, lambda row: keep([row])))


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
    if options.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch finds no GPU")
    if options.resume and (options.json is None or options.json.suffix == ".json"):
        p.error("--resume: there is no folder of results; name it with --json")
    if options.retime and not options.from_json:
        p.error("--retime: no earlier results; name them with --from-json")
    if options.threads:
        torch.set_num_threads(options.threads)
    failed = False
    reports = []
    for found in [report.load(options.from_json)] if options.from_json else measure(options):
        if options.retime:
            retime(found, torch.device(options.device))
        show(found, options)
        failed |= found.failed
        reports.append(found)
    if options.json and options.json.suffix == ".json":
        print(f"wrote {report.save(report.merged(reports), options.json)}")
    return int(failed)


def show(found: report.Report, options: argparse.Namespace) -> None:
    """Prints a report, compares, plots, and writes it where results go to a folder."""
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
        earlier = options.compare / found.file_name if options.compare.is_dir() else options.compare
        if earlier.is_file():
            print(f"\n{compare.text(report.load(earlier), found)}")
        else:
            print(f"\nnothing to compare with: there is no {earlier}")
    if options.json and options.json.suffix != ".json":
        print(f"wrote {report.save(found, options.json)}")
    if options.plot:
        for name, rows in found.rows.items():
            for path in plots.draw(SUITES[name], rows, found, options.plot):
                print(f"wrote {path}")
        for name in found.studies:
            print(f"wrote {plots.draw_study(STUDIES[name], found, options.plot)}")


if __name__ == "__main__":
    sys.exit(main())
