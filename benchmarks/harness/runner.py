"""Runs the cases of a suite: check, then time, one row after another."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.harness.case import OURS, Bench, Case, Contender, Step
from benchmarks.harness.check import Error, judge, judge_baseline, measure_all
from benchmarks.harness.contention import TOLERATED, Others
from benchmarks.harness.kernels import KernelTime, measure
from benchmarks.harness.limits import Limits
from benchmarks.harness.machine import today
from benchmarks.harness.memory import peak_mib
from benchmarks.harness.report import BUSY, FAILED, OK, UNAVAILABLE, Outcome, Row
from benchmarks.harness.timing import Budget, interleaved

# How often a row is timed whose times something else disturbs, and from how many seconds on times are to be trusted.
ATTEMPTS, MEASURES = 2, 1.0


def run(
    cases: Sequence[Case],
    device: torch.device,
    budget: Budget,
    limits: Limits,
    found: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """The rows of all cases; ``found`` gets each as soon as it is there.

    Progress goes to stderr. ``limits`` are measured for a dtype when it first comes.
    """
    rows = []
    for case in cases:
        if case.dtype_name not in limits.gemm:
            limits.measure([case.dtype], _limit_seconds(budget))
        print(case.title, file=sys.stderr, flush=True)
        rows.append(run_case(case, device, budget))
        rows[-1].set_limit(limits)
        found(rows[-1])
    # Once more at the end: if the machine was slowed down at the start, the limit would be too low.
    limits.measure(sorted({case.dtype for case in cases}, key=str), _limit_seconds(budget))
    for row in rows:
        row.set_limit(limits)
    return rows


def _limit_seconds(budget: Budget) -> float:
    return min(2.0, budget.seconds / 2)


def run_case(case: Case, device: torch.device, budget: Budget) -> Row:
    """One row: every contender that passes the check is timed, the others say why not."""
    bench = case.build(device)
    outcomes, steps = check(bench, case.dtype, memory=device if case.memory else None)
    if case.rounds is not None:
        budget = dataclasses.replace(budget, min_rounds=min(budget.min_rounds, case.rounds))
    if case.seconds is not None:
        budget = dataclasses.replace(budget, seconds=min(budget.seconds, case.seconds))
    for _ in range(ATTEMPTS):
        others = Others()
        timings = interleaved(steps, device, budget) if steps else {}
        taken = others.cores()
        # A smoke test is no measurement; and a GPU does not share its time with other processes of the processors.
        quiet = taken <= TOLERATED or budget.seconds < MEASURES or device.type == "cuda"
        if quiet:
            break
    if quiet and taken > TOLERATED:
        print(f"  other processes took {taken:.1f} cores while this was timed", file=sys.stderr, flush=True)
    for name, timing in timings.items():
        if quiet:
            outcomes[name].timing = timing
        else:
            outcomes[name].status = BUSY
            outcomes[name].reason = f"other processes took {taken:.1f} cores while this was timed, {ATTEMPTS} times"
    kernels, no_kernels = kernel_times(case, steps, device)
    torch._dynamo.reset()  # compiled code and CUDA graphs of this row are not needed again
    return Row(
        workload=case.workload,
        work=case.work,
        dtype=case.dtype_name,
        size=dict(case.size),
        flop=case.flop,
        traffic=case.traffic,
        resident=case.resident,
        outcomes=outcomes,
        baseline=bench.baseline,
        kernels=kernels,
        no_kernels=no_kernels,
        date=today(),
    )


def kernel_times(case: Case, steps: Mapping[str, Step], device: torch.device) -> tuple[list[KernelTime], str]:
    """The time of each of our kernels on a GPU, or why it is not known."""
    if device.type != "cuda" or case.launches is None or OURS not in steps:
        return [], ""
    try:
        return measure(steps[OURS], case.launches(device)), ""
    except ValueError as error:
        return [], str(error)


def check(
    bench: Bench, dtype: torch.dtype, memory: torch.device | None = None
) -> tuple[dict[str, Outcome], dict[str, Step]]:
    """Compares every contender with float64; the outcomes, and the steps of those that may be timed.

    With ``memory`` the peak memory of a call on that device is measured as well.
    """
    expected = bench.expected()
    outcomes: dict[str, Outcome] = {}
    steps: dict[str, Step] = {}
    budget: dict[str, Error] | None = None
    for contender in sorted(bench.contenders, key=lambda c: c.name != bench.baseline):
        outcome = Outcome(contender.label, UNAVAILABLE)
        outcomes[contender.name] = outcome
        if contender.name != bench.baseline and budget is None:
            outcome.reason = "the baseline has failed, so there is no error budget"
            continue
        try:
            due = expected if contender.expected is None else contender.expected()
            step, outcome.peak, errors = _first_call(contender, due, memory)
        except Exception as error:  # a contender that cannot run is a result, which the table shows with its reason
            outcome.reason = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome.status = FAILED if contender.name in (bench.baseline, OURS) else UNAVAILABLE
            continue
        slack = bench.slack
        verdict = judge(errors, budget, dtype, slack) if budget else judge_baseline(errors, dtype, slack)
        outcome.error, outcome.reason = verdict.error, verdict.reason
        outcome.status = OK if verdict.ok else FAILED
        if verdict.ok:
            steps[contender.name] = step
            budget = errors if budget is None else budget
    return outcomes, steps


def _first_call(
    contender: Contender, expected: Mapping[str, Tensor], memory: torch.device | None
) -> tuple[Step, float | None, dict[str, Error]]:
    """Builds the step, calls it twice, since the second call may take another path than the first, and compares."""
    step = contender.build()
    peak = None
    step()
    if memory is None:
        step()
    else:  # the second call: the first may compile
        peak = peak_mib(step, memory)
    return step, peak, measure_all(step.results(), expected)
