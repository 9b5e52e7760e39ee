"""What the host does for a call on a GPU, with a driver that launches nothing."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops import _recording

pytest.importorskip("triton")
from triton import knobs  # noqa: E402

from benchmarks.gpu_host.driver import Driver, launching_nothing  # noqa: E402
from benchmarks.suites import gpu_host  # noqa: E402

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason="the C++ kernels are not built")
PACKAGE = str(Path(mk.__file__).parent)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with launching_nothing() as found:
        yield found


def level(experts: int) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """A call of a level whose experts all gates mix, and its parameters."""
    routing = mk.Routing.mmoe(experts, 2)
    weights = [torch.randn(16, 16).bfloat16() for _ in range(experts)]
    biases = [torch.randn(16).bfloat16() for _ in range(experts)]
    gates = [torch.randn(experts, 16).bfloat16() for _ in range(2)]
    x = torch.randn(4, 16).bfloat16()

    def run() -> tuple[Tensor, ...]:
        return mk.expert_mixture(x, [weights], [biases], None, routing, gate_weights=gates)

    return run, [x, *weights, *biases, *gates]


def step(run: Callable[[], tuple[Tensor, ...]]) -> None:
    torch.autograd.backward(run(), [torch.ones(4, 16).bfloat16() for _ in range(2)])


def launched(driver: Driver, run: Callable[[], Any]) -> list[Any]:
    """Grids and arguments, of which tensors only by dtype and shape."""
    found: list[Any] = []

    def watch(grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        found.append((grid, [(a.dtype, tuple(a.shape)) if isinstance(a, Tensor) else a for a in args]))

    driver.watch = watch
    try:
        run()
    finally:
        driver.watch = None
    return found


def test_a_replayed_call_launches_what_triton_itself_does(driver: Driver) -> None:
    run, parameters = level(3)
    assert launched(driver, run) == launched(driver, run) != []
    for parameter in parameters:
        parameter.requires_grad_()
    whole = [launched(driver, lambda: step(run)) for _ in range(3)]
    assert whole[0] == whole[1] == whole[2] and len(whole[0]) > 3


def test_levels_alike_are_all_recorded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trunks of many scenarios are, which take turns."""
    replayed: list[_recording.Recording] = []
    replay = _recording.Recording.replay
    monkeypatch.setattr(
        _recording.Recording, "replay", lambda self, *args: (replayed.append(self), replay(self, *args))[1]
    )
    runs = [level(2)[0] for _ in range(40)]
    for count in (0, 0, 40):
        for run in runs:
            run()
        assert len({*map(id, replayed)}) == len(replayed) == count


def test_more_tasks_than_one_program_projects(driver: Driver) -> None:
    """Of a hundred it would spill, of five hundred take minutes to compile, and of a thousand not compile."""
    grads = [[torch.randn(3)] for _ in range(80)]
    names: list[str] = []
    driver.watch = lambda grid, args: names.append(str(grid))
    try:
        (found,) = mk.pcgrad(grads, generator=torch.Generator().manual_seed(0))
    finally:
        driver.watch = None
    assert found.shape == (3,) and len(names) == 3  # two for the Gram matrix, one for the result


def test_hooks_see_launches_that_are_made_again(driver: Driver) -> None:
    """A profiler's, which want to know each launch's name."""
    run, _ = level(3)
    for _ in range(2):
        run()
    found: list[tuple[str, str]] = []
    hooks = [(knobs.runtime.launch_enter_hook, "begins"), (knobs.runtime.launch_exit_hook, "ends")]
    notes = [lambda launch, what=what: found.append((what, launch.get()["name"])) for _, what in hooks]
    for (chain, _), note in zip(hooks, notes, strict=True):
        chain.add(note)
    try:
        run()
    finally:
        for (chain, _), note in zip(hooks, notes, strict=True):
            chain.remove(note)
    names = [name for what, name in found if what == "begins"]
    assert names and found == [(what, name) for name in names for what in ("begins", "ends")]
    run()
    assert len(found) == 2 * len(names)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_either_hook_alone_sees_launches(driver: Driver, hook: str) -> None:
    run, _ = level(3)
    for _ in range(2):
        run()
    found: list[str] = []

    def note(launch: Any) -> None:
        found.append(launch.get()["name"])

    chain = getattr(knobs.runtime, hook)
    chain.add(note)
    try:
        run()
    finally:
        chain.remove(note)
    assert found


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward and backward"])
def test_a_recording_holds_no_calls_memory(driver: Driver, trains: bool) -> None:
    """Neither that of the call that was recorded nor that of those that are replayed."""
    run, parameters = level(3)
    for parameter in parameters:
        parameter.requires_grad_(trains)
    taken: list[weakref.ref[Tensor]] = []

    def watch(grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        taken.extend(weakref.ref(arg) for arg in args if isinstance(arg, Tensor))

    driver.watch = watch
    try:
        for _ in range(5):
            if trains:
                step(run)
            else:
                run()
    finally:
        driver.watch = None
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    assert taken and all(tensor() is None for tensor in taken)


def calls_of_ours(run: Callable[[], Any]) -> int:
    """How many of this package's Python functions a call runs."""
    found = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward and backward"])
def test_no_work_in_python_grows_with_the_experts(driver: Driver, trains: bool) -> None:
    counts = []
    for experts in (3, 12):
        run, parameters = level(experts)
        for parameter in parameters:
            parameter.requires_grad_(trains)
        whole = (lambda run=run: step(run)) if trains else run  # type: ignore[misc]
        for _ in range(4):  # the second forward pass is recorded, and the second backward pass behind a replayed one
            whole()
        counts.append(calls_of_ours(whole))
    assert counts[0] == counts[1] and counts[0] <= (80 if trains else 45)


def test_the_study(driver: Driver) -> None:
    found = gpu_host.STUDY.run(torch.device("cpu"), True)
    assert {row["experts"] for row in found["rows"]} and "| forward |" in gpu_host.STUDY.show(found, True)


def test_what_else_a_step_launches_compiles() -> None:
    """By the way that launches go: programs that share the columns of 416 inputs, and PCGrad without projections."""
    routing = mk.Routing.mmoe(3, 1)
    shapes = (128, 416), (16, 128)
    weights = [[torch.randn(shape).half().requires_grad_() for _ in range(3)] for shape in shapes]
    x, gates = torch.randn(2**15, 416).half().requires_grad_(), torch.randn(3, 416).half().requires_grad_()
    with launching_nothing(90) as driver:
        (y,) = mk.expert_mixture(x, weights, None, None, routing, gate_weights=[gates])
        launches: list[Any] = []
        driver.watch = lambda grid, args: launches.append(grid)
        torch.autograd.backward(y, torch.ones_like(y))
        assert len(launches) == 4
        for project in (True, False):
            mk.pcgrad([[torch.randn(100)], [torch.randn(100)]], project=project, max_norm=1.0)
        assert len(launches) > 4
