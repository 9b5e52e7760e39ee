"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer.

Builds them, makes faults that have to be found, and runs tests, the fuzzer and many threads. Prints a line a phase; the
exit status is 1 where anything was found, or where a planted fault was not.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.csrc import sanitizers
from tests.sanitize.phases import PHASES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.sanitize", description=str(__doc__).partition("\n")[0])
    names = [name for phase in PHASES for name in (phase.kind, f"{phase.kind}:{phase.name}")]
    p.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="of " + ", ".join(dict.fromkeys(names)))
    p.add_argument("--short", action="store_true", help="fewer tests, cases and rounds")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    failed = False
    for phase in PHASES:
        if options.only and not {phase.kind, f"{phase.kind}:{phase.name}"} & {*options.only}:
            continue
        if sanitizers.launcher(phase.kind) is None:  # which is not clean
            failed = True
            print(f"{phase.kind:<8}{phase.name:<8}not run: needs {sanitizers.NAMES[phase.kind]}", flush=True)
            continue
        start = time.perf_counter()
        outcome = phase.run(phase.kind, options.short)
        if outcome.findings:
            failed = True
            print(outcome.findings, flush=True)
        verdict = "FOUND" if outcome.findings else "clean"
        print(
            f"{phase.kind:<8}{phase.name:<8}{verdict}  {time.perf_counter() - start:6.0f} s  {outcome.text}", flush=True
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
