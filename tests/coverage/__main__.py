"""Builds the C++ kernels for gcov, runs the tests that call them, and says which branches of csrc these have taken.

The build has the instruction set "split", so that where there are bfloat16 dot products the kernels for AMX run, but
for AMX's own instructions. Exit status 1: a test has failed, fewer branches were taken than LIMIT in all, or than LIMIT
of a file's that exceptions.py does not list. CUDA C++ kernels and csrc/portable.cpp are not part of this build.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from tests import instrumented
from tests.coverage import branches
from tests.coverage.branches import Line
from tests.coverage.exceptions import EXCEPTIONS

LIMIT = 0.95
# Whose tests call csrc; torch.compile and counting page faults take minutes, and get to nothing that others do not.
SELECTED = (
    "tests/ops", "tests/nn", "tests/optim", "tests/convert/test_kept.py", "tests/convert/test_readings.py",
    "tests/convert/test_readings_held.py", "tests/convert/test_readings_kinds.py", "tests/convert/test_seen.py",
    "tests/convert/test_seen_kinds.py", "tests/csrc/test_failing_memory.py",
    "tests/test_decisions.py", "tests/test_dumps.py", "tests/test_never_stale.py", "tests/test_prepare.py",
    "tests/test_show_config.py", "tests/ways_out/test_forward_mode.py",
    "--ignore=tests/ops/test_compile.py", "-k", "not page_faults", "-m", "not slow",
)  # fmt: skip
# By Triton's interpreter: what is recorded of a call, and made again from C++.
INTERPRETED = ("tests/triton/interpreted_recordings.py",)


def run_tests(processes: int, parts: int) -> bool:
    """Whether all passed of as many of ``parts`` shares of the tests as there are processes."""
    for old in instrumented.place("coverage").rglob("*.gcda"):
        old.unlink()
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--require-backend", "cpp"]

    def share(part: int) -> int:
        selected = [*pytest, "-p", "tests.coverage.share", *SELECTED]
        variables = {"OMP_WAIT_POLICY": "passive", "SHARE_PART": str(part), "SHARE_PARTS": str(parts)}
        return instrumented.run("coverage", selected, **variables)

    with ThreadPoolExecutor(processes) as pool:
        failed = any([*pool.map(share, range(processes))])
    failed |= instrumented.run("coverage", [*pytest, *INTERPRETED], TRITON_INTERPRET="1") != 0
    return not failed


def excepted(file: str, line: Line) -> bool:
    return any(code in line.text for code in EXCEPTIONS.get(file, {}))


def share(taken: int, missed: int) -> float:
    return taken / (taken + missed) if taken + missed else 1.0


def report(files: dict[str, list[Line]]) -> list[str]:
    """Prints what was taken of each file, and the rest; what is wrong."""
    wrong = []
    print(f"\n{'file':52} {'lines':>11} {'branches':>11} {'taken':>7} {'listed':>7}")
    for file, lines in files.items():
        taken, missed = sum(line.taken.count(True) for line in lines), sum(line.missed for line in lines)
        listed = sum(line.missed for line in lines if excepted(file, line))
        ran = sum(line.ran for line in lines)
        counts = f"{ran:5}/{len(lines):5} {taken:5}/{taken + missed:5} {share(taken, missed):7.1%} {listed:7}"
        print(f"{file:52} {counts}")
        if share(taken, missed - listed) < LIMIT:
            wrong.append(f"{file}: {share(taken, missed - listed):.1%} of what exceptions.py does not list")
    for file, lines in files.items():
        for line in lines:
            if line.missed and not excepted(file, line):
                print(f"{file}:{line.number}: {line.missed} of {len(line.taken)} not taken: {line.text}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("--report", action="store_true", help="only of what an earlier run has counted")
    parser.add_argument("--processes", type=int, default=2, help="that share the tests; 2 by default")
    parser.add_argument("--parts", type=int, help="run a share of the tests a process of so many shares, for a sample")
    arguments = parser.parse_args()
    wrong = []
    if not arguments.report:
        instrumented.build("coverage", "-DMTLK_SPLIT=ON")
        if not run_tests(arguments.processes, arguments.parts or arguments.processes):
            wrong.append("a test has failed")
    root = instrumented.place("coverage")
    counts = branches.counted(root, "csrc")
    files = branches.lines(counts, root)
    wrong += report(files)
    every = [line for lines in files.values() for line in lines]
    total = share(sum(line.taken.count(True) for line in every), sum(line.missed for line in every))
    print(f"\nlines {sum(line.ran for line in every) / len(every):.1%}, branches {total:.1%} of all;", end=" ")
    print(f"where each instance of a template counts by itself {branches.share_of_instances(counts):.1%}")
    if total < LIMIT:
        wrong.append(f"{total:.1%} of all branches")
    if wrong:
        sys.exit("\n".join(["less than it must be:", *wrong]))


if __name__ == "__main__":
    main()
