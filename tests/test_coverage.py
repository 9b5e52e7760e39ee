"""What ``make coverage`` makes of gcov's counts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import instrumented
from tests.coverage.branches import counted, instances_of_lambda, lines, of_each, of_source, share_of_instances
from tests.coverage.exceptions import EXCEPTIONS
from tests.instrumented import ROOT


def test_a_branch_is_taken_if_an_instance_takes_it() -> None:
    assert of_source([(True, False), (False, False), ()]) == (True, False)
    assert of_source([(True, False), (False, True)]) == (True, True)


def test_instances_of_other_code_count_by_themselves() -> None:
    assert of_source([(True, False), (False, True, False)]) == (True, False, False, True, False)


def test_inlined_copies_are_one() -> None:
    assert of_source([(False, False), (True, False, False, False)]) == (True, False)


def test_exceptions_are_of_lines_that_are_there() -> None:
    for file, reasons in EXCEPTIONS.items():
        source = (ROOT / file).read_text()
        for code, reason in reasons.items():
            assert code in source and reason, f"{file}: {code}"


SOURCE = """\
template <typename F>
void each(F f) {
  run([&](auto constant) {
    if (f) {
      f(constant); }
  });
  if (f) done();
}
""".splitlines()
# GCC's word on two instances of the lambda, and on the function around them.
LAMBDA = {
    "demangled_name": "each<F>(F)::{lambda(auto:1)#1}::operator()",
    "start_line": 3,
    "end_line": 3,
    "start_column": 7,
}
AROUND = {"demangled_name": "each<F>(F)", "start_line": 2, "end_line": 8, "start_column": 6}


def test_instances_of_a_generic_lambda_are_told_apart() -> None:
    functions = [AROUND, LAMBDA, LAMBDA]
    found = [instances_of_lambda(functions, SOURCE, {"line_number": number}) for number in range(2, 9)]
    assert found == [1, 1, 2, 2, 2, 1, 1]
    assert list(of_each((True, False, False, True), 2)) == [(True, False), (False, True)]


def test_instances_of_different_code_stay_together() -> None:
    assert list(of_each((True, False, False), 2)) == [(True, False, False)]


def test_counts_of_a_program(tmp_path: Path) -> None:
    """From the compiler to the report: a template of two instances, each of which takes one side."""
    if instrumented.COMPILER is None or "g++" not in Path(instrumented.COMPILER).resolve().name:
        pytest.skip("needs g++, which this machine lacks")
    source = "template <int N> int f(int x) {\n  if (x > N) return 1;\n  return 0;\n}\n"
    (tmp_path / "csrc").mkdir()
    (tmp_path / "build").mkdir()
    (tmp_path / "csrc/f.cpp").write_text(source + "int main(int n, char**) { return f<5>(n) + f<0>(n) - 1; }\n")
    command = [instrumented.COMPILER, "--coverage", "-O1", "-fno-early-inlining", "../csrc/f.cpp", "-o", "f"]
    subprocess.run(command, cwd=tmp_path / "build", check=True)
    subprocess.run(["./f"], cwd=tmp_path / "build", check=True)
    counts = counted(tmp_path, "csrc")
    (file,) = lines(counts, tmp_path).values()
    (line,) = [line for line in file if line.number == 2]
    assert (line.text, line.taken, line.ran) == ("if (x > N) return 1;", (True, True), True)
    assert share_of_instances(counts) == 0.5
