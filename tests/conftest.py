"""Options and fixtures of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _backends, _extension
from mtlkernels.testing import DTYPES
from tests.seeding import seed

pytest_plugins = ["tests.summary"]

# Of this checkout: a graph of another version, from PyTorch's own folder, stops where what is saved has changed.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "inductor"))


def pytest_addoption(parser: pytest.Parser) -> None:
    if pytest.version_tuple < (9,):  # of a machine whose packages stay; a test that hangs is only shown there
        parser.addini("faulthandler_exit_on_timeout", "as pytest 9 has it", type="bool", default=False)
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="fail unless every op has this implementation on the CPU, so that it cannot vanish silently",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--require-backend"):
        missing = [op for op, devices in mk.backends().items() if name not in devices["cpu"]]
        if missing:
            raise pytest.UsageError(
                f"--require-backend {name}: this install has none for {', '.join(missing)}\n{mk.show_config()}"
            )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that processes that share the tests end together.

    Tests of large tensors are left out unless they are asked for: two of them at a time would not fit.
    """
    if "large" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("large")])
        items[:] = [item for item in items if not item.get_closest_marker("large")]
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")


def _keep_what_stands() -> None:
    """Leaves what stands now out of each collection from here on, of which it would be most of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Some 17,000 tests and PyTorch's classes stay for good."""
    _keep_what_stands()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """So does what a file's tests have imported: PyTorch's compiler alone is a million objects."""
    if nextitem is not None and nextitem.path != item.path:
        _keep_what_stands()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_report_header() -> str:
    return mk.show_config()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests of these have no reason for which they are skipped: there are none."""
    compiled = _extension.build_facts().get("compiled for", "").split()
    if lacking := [name for name in compiled if name not in _extension.instruction_sets()]:
        terminalreporter.line(f"kernels not run, as this processor lacks the instructions: {', '.join(lacking)}")


def cpu_backends(op: str) -> tuple[str, ...]:
    """The implementations of an op to test on this install's CPU; tests/triton has those under the interpreter."""
    return tuple(name for name in mk.backends()[op]["cpu"] if name != "triton")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend``: each implementation by name, of one op in its folder. ``dtype``: each of the four."""
    if "backend" in metafunc.fixturenames:
        folder = metafunc.definition.path.parent.name
        ops = [folder] if folder in mk.backends() else list(mk.backends())
        names = dict.fromkeys(name for op in ops for name in cpu_backends(op))
        metafunc.parametrize("backend", list(names))
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """One thread: most tests are too small for more, and waiting for each other on a busy machine takes minutes."""
    seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _conversions_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without C++ kernels mk.convert would leave every model alone; its tests then run by the reference."""
    if not _extension.loaded():
        monkeypatch.setattr(_backends, "fast", lambda op, device, dtype: True)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forgets what torch.compile has compiled, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of one rank, this process; for tests that need gloo, see ``tests.requires``."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
