"""The memory pool under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer.

``make sanitize`` does the same with all of the C++ kernels, which take long to compile.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc import library, sanitizers

pytestmark = library.needs_compiler


@pytest.fixture(scope="module", params=sanitizers.FAULTS)
def kind(request: pytest.FixtureRequest) -> str:
    sanitizers.need(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def program(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp(kind) / "pool"
    sanitizers.compile_with_pool(kind, library.HERE / "pool.cpp", target)
    return target


def test_the_pool_as_it_is(kind: str, program: Path) -> None:
    found = sanitizers.run(kind, program)
    assert found.returncode == 0 and not found.stderr, found.stdout + found.stderr


def test_planted_faults_are_found(kind: str, program: Path) -> None:
    found = sanitizers.run(kind, program, list(sanitizers.FAULTS[kind]))
    assert not sanitizers.not_found(kind, found.stderr), found.stdout + found.stderr


def test_children_of_a_fork(kind: str, program: Path) -> None:
    """Under ThreadSanitizer alone: a fork may find AddressSanitizer's own lock held."""
    if kind == "thread":
        found = sanitizers.run(kind, program, ["forks"])
        assert found.returncode == 0, found.stdout + found.stderr


def test_a_pool_without_its_lock(kind: str, program: Path) -> None:
    """Chance decides whether anything but ThreadSanitizer notices.

    Its first report ends the program: the pool's trees, once broken, may be walked in a circle for ever.
    """
    if kind == "thread":
        found = sanitizers.run(kind, program, ["a pool without its lock"], {"TSAN_OPTIONS": "halt_on_error=1"})
        assert found.returncode != 0 and "data race" in found.stderr, found.stdout + found.stderr
