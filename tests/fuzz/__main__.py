"""``python -m tests.fuzz --cases 10000 --seed 1``: random calls of every op; prints a test for each that fails."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import time

from tests.fuzz import processes
from tests.fuzz.calls import too_many_second_trials
from tests.fuzz.targets import TARGETS

# A case of a model is three steps of training, twice, and more; Triton's kernels run in its interpreter, some thousand
# times slower than the others.
ONE_OF_MODELS, ONE_OF_TRITON = 10, 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases an op (1000); of models a tenth")
    parser.add_argument("--seed", type=int, help="of all cases; by default another one each time")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="targets")
    parser.add_argument("--without-triton", action="store_true", help="no kernels in Triton's interpreter")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    ops = [name for name in options.only if name != "convert"]
    runs = [(name, options.cases, False) for name in ops]
    if importlib.util.find_spec("triton") and not options.without_triton:
        runs += [(name, max(1, options.cases // ONE_OF_TRITON), True) for name in ops]
    if "convert" in options.only:
        runs.append(("convert", max(1, options.cases // ONE_OF_MODELS), False))
    print(f"seed {seed}, {options.jobs} processes", flush=True)
    failed = False
    for name, cases, interpreted in runs:
        failed = _run(name, cases, seed, min(options.jobs, cases), interpreted) or failed
    return int(failed)


def _run(name: str, cases: int, seed: int, jobs: int, interpreted: bool) -> bool:
    """Whether something was found; prints it, and what the cases were."""
    started = time.monotonic()
    outcome = processes.run(name, cases, seed, jobs, interpreted=interpreted)
    title = f"{name}, by Triton's interpreter" if interpreted else name
    too_many = None if outcome.findings else too_many_second_trials(outcome.counts, cases)
    verdict = too_many or (f"{len(outcome.findings)} findings" if outcome.findings else "nothing found")
    print(f"{title}: {cases:,} cases, {verdict}, {time.monotonic() - started:.0f} s")
    print("".join(f"    {what}: {count:,}\n" for what, count in sorted(outcome.counts.items())), end="", flush=True)
    for finding in outcome.findings:
        print(f"\n{finding.error}\n{finding.as_test()}", flush=True)
    return bool(outcome.findings or too_many)


if __name__ == "__main__":
    raise SystemExit(main())
