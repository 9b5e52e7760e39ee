"""A pytest plugin: the end of a run says what was skipped and why, and which cases needed a second, looser trial."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

SECOND_TRIAL = "second trial"
notes: list[str] = []


def note_second_trial(reason: str, count: int = 1) -> None:
    """That the running test had so many cases which passed by a looser measure only."""
    notes.extend([reason] * count)


def second_trials(count: int) -> str:
    return f"{count:,} case{'' if count == 1 else 's'} needed a second, looser trial"


def note_those_of(output: str, reason: str) -> None:
    """Those that another process counted, by what it printed."""
    for count in re.findall(r"([\d,]+) cases? needed a second, looser trial", output):
        note_second_trial(reason, int(count.replace(",", "")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    notes.clear()
    try:
        return (yield)
    finally:
        item.user_properties.extend((SECOND_TRIAL, note) for note in notes)


def _reason(report: Any) -> str:
    return str(report.longrepr[2]).removeprefix("Skipped: ")


class Summary:
    """Of one process; workers of pytest-xdist tell theirs of the files that they skipped as a whole."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.files[report.nodeid] = _reason(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["skipped files"] = self.files

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.files |= getattr(node, "workeroutput", {}).get("skipped files", {})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        stats = terminalreporter.stats
        reports = (report for report in stats.get("skipped", ()) if isinstance(report, pytest.TestReport))
        skipped = Counter(map(_reason, reports))
        if skipped or self.files:
            terminalreporter.section(f"{skipped.total():,} skipped, and why")
        for reason, count in skipped.most_common():
            terminalreporter.line(f"{count:6,}  {reason}")
        for name, reason in sorted(self.files.items()):
            terminalreporter.line(f"{name}, all of it: {reason}")
        calls = (report for kind in stats.values() for report in kind if getattr(report, "when", "") == "call")
        trials = [
            (note, report.nodeid.partition("[")[0])
            for report in calls
            for name, note in report.user_properties
            if name == SECOND_TRIAL
        ]
        if trials:
            terminalreporter.section(second_trials(len(trials)))
        for (note, test), count in Counter(trials).most_common():
            terminalreporter.line(f"{count:6,}  {note}: {test}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Summary())
