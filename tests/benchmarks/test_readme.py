"""The tables of README and of the site are what the kept results say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.harness import report as reports
from benchmarks.harness.case import OURS
from benchmarks.harness.report import BUSY, FAILED
from benchmarks.harness.timing import QUICK
from benchmarks.suites import snr

RESULTS = readme.ROOT / "benchmarks" / "results"


TEXTS = {page: page.read_text() for page in readme.PAGES}
SHOWN = [(name, file) for text in TEXTS.values() for name, file, _ in readme._TABLE.findall(text)]


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[reports.Report, Path]:
    """Results of the suite mixture that the site shows, as before it had frozen graphs; where a test puts its own."""
    file = next(file for name, file in SHOWN if name == "mixture" and "zen-4" in file)
    found = reports.load(readme.ROOT / file)
    for row in found.rows["mixture"]:
        row.outcomes.pop("frozen", None)
    return found, tmp_path / "results.json"


def marked(inside: str, name: str = "mixture", file: str = "results.json") -> str:
    return f"Before.\n<!-- table: {name} from {file} -->\n{inside}<!-- /table -->\nAfter.\n"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(readme.ROOT)))
def test_pages_show_the_kept_results(page: Path) -> None:
    text = TEXTS[page]
    assert readme.rewritten(text) == text, f"tables of {page.name} differ from benchmarks/results: run `make readme`"
    outside = readme._TABLE.sub("", text)
    assert not [line for line in outside.splitlines() if line.startswith("|") and (" ms |" in line or "× |" in line)]


def test_every_table_is_shown() -> None:
    kept = {suite for path in RESULTS.glob("*.json") for suite in reports.load(path).rows}
    wanted = {
        name for name, table in readme.TABLES.items() if not isinstance(table, readme.Table) or table.suite in kept
    }
    assert {name for name, _ in SHOWN} == wanted


def test_every_file_of_results_has_its_place() -> None:
    """New ones want a page of ``docs/performance``: a table, a plot, a link, or to be part of a page."""
    pages = "".join(text for page, text in TEXTS.items() if page.parent.name == "performance")
    pages += "".join(path.read_text() for path in RESULTS.glob("*.md") if path.name in pages)
    assert not [path.name for path in sorted(RESULTS.iterdir()) if path.name not in pages]


def test_a_table_follows_its_file(mixture: tuple[reports.Report, Path]) -> None:
    found, path = mixture
    first = found.rows["mixture"][0]
    ours, eager = first.timing(OURS), first.timing("eager")
    assert ours and eager
    first.outcomes[OURS].timing = reports.Timing(**{**vars(ours), "median": eager.median / 8})
    first.outcomes[OURS].peak, first.outcomes["eager"].peak = 31.2, 1234.5
    first.outcomes["compile"].timing, first.outcomes["compile"].status = None, FAILED
    reports.save(found, path)
    text = readme.rewritten(marked("| old |\n"), path.parent)
    head, rule, line, *rest = [x for x in text.splitlines() if x.startswith("|")]
    shown = [row for row in found.rows["mixture"] if row.workload in readme.LEVELS]
    assert len(rest) == len(shown) - 1 and head.count("|") == rule.count("|") == line.count("|")
    assert (
        "**8.00×**" in line
        and "| 1,234 → 31 MiB |" in line
        and "peak memory, eager → ours" in head
        and "| – |" in line
        and "old" not in text
    )
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n")
    assert readme.rewritten(text, path.parent) == text


@pytest.mark.parametrize("name", [OURS, "eager", "compile"])
@pytest.mark.parametrize("status", [FAILED, BUSY])
def test_gains_are_of_every_row(mixture: tuple[reports.Report, Path], name: str, status: str) -> None:
    """A row without a time would make the line look better."""
    found, _ = mixture
    row = next(row for row in found.rows["mixture"] if row.work == "forward" and row.size["B"] == 256)
    row.outcomes[name].timing, row.outcomes[name].status = None, status
    with pytest.raises(ValueError, match=f"gains: A1 B=256 forward float32 has no speed-up .*: {name} is {status}"):
        readme.TABLES["gains"](found)


def test_smoke_tests_are_not_shown(mixture: tuple[reports.Report, Path]) -> None:
    found, path = mixture
    found.budget = dataclasses.asdict(QUICK)
    reports.save(found, path)
    with pytest.raises(ValueError, match="results.json is of a run with --quick"):
        readme.rewritten(marked(""), path.parent)


def test_compiled_is_the_better_of_two_where_there_are_two(mixture: tuple[reports.Report, Path]) -> None:
    found, _ = mixture
    before = readme.TABLES["mixture"](found)
    assert "| torch.compile, ms |" in before[0]
    for row in found.rows["mixture"]:
        ours = row.timing(OURS)
        if row.workload == "A1" and ours:
            faster = dataclasses.replace(ours, median=ours.median / 4)
            row.outcomes["frozen"] = reports.Outcome("frozen", reports.OK, timing=faster)
    head, _, first, *_ = readme.TABLES["mixture"](found)
    assert "| torch.compile, ms |" in head and " (frozen) |" in first and "| 0.250× |" in first
    _, _, serving, *others = readme.TABLES["gains"](found)
    assert "the better of default and frozen" in serving and serving.count("| 0.25× |") == 2
    assert "frozen" not in others[-1]  # in training it is no contender


@pytest.mark.parametrize("table", ["snr", "snr-aver"])
def test_open_routes_alone_have_their_columns_where_they_are(table: str) -> None:
    file = next(file for name, file in SHOWN if name == table)
    found = reports.load(readme.ROOT / file)
    for row in found.rows["snr"]:
        for name in (snr.OPEN_ALONE, snr.OPEN_ALONE_COMPILED):
            row.outcomes.pop(name, None)
    assert not any("alone" in line for line in readme.TABLES[table](found))
    for row in found.rows["snr"]:
        ours = row.timing(OURS)
        assert ours
        for name, factor in ((snr.OPEN_ALONE, 2.0), (snr.OPEN_ALONE_COMPILED, 1.5)):
            slower = dataclasses.replace(ours, median=factor * ours.median)
            row.outcomes[name] = reports.Outcome(name, reports.OK, timing=slower)
    head, _, *lines = readme.TABLES[table](found)
    assert "| folded, open routes alone, ms | folded, open routes alone, torch.compile, ms |" in head
    assert "| vs open routes alone |" in head and all("| **1.50×** |" in line for line in lines)


def test_serving_says_which_compiled_it_shows() -> None:
    file = next(file for name, file in SHOWN if name == "serving")
    found = reports.load(readme.ROOT / file)
    for row in found.studies["serving"]["rows"]:
        if row["model"] != "level":
            row.get("p50", {}).pop("frozen", None)
    assert "| modules, torch.compile, ms |" in readme.TABLES["serving"](found)[2]
    for row in found.studies["serving"]["rows"]:
        if "compile" in row.get("p50", {}):
            row["p50"]["frozen"] = 1.0
    lines = readme.TABLES["serving"](found)
    assert f"| modules, {readme.BETTER}, ms |" in lines[2]
    assert all("| 0.00100 |" in line for line in lines[4:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (marked("", name="unheard-of"), "no table 'unheard-of'; there are machine, gains"),
        (marked("", file="absent.json"), "there is no file absent.json"),
        (marked("", name="snr"), "the suite snr has no rows to show"),
        ("<!-- table: mixture from results.json -->\n| 1 |\n", "must be followed by its own"),
        ("| 1 |\n<!-- /table -->\n", "must be followed by its own"),
        (marked("<!-- table: snr from results.json -->\n"), "must be followed by its own"),
    ],
)
def test_what_cannot_be_made_is_refused(mixture: tuple[reports.Report, Path], text: str, message: str) -> None:
    found, path = mixture
    reports.save(found, path)
    with pytest.raises(ValueError, match=message):
        readme.rewritten(text, path.parent)
