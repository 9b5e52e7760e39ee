"""What the kernels keep for the next call: enough for a step's results to cost no page faults, else at most 256 MiB."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mtlkernels as mk
from tests import requires
from tests.ops.kept_memory import release

pytestmark = requires.cpp_kernels

ROOT = Path(__file__).parents[2]
MIB = 2**20
MOST = 256 * MIB
# With huge pages a fault brings as much as this, without them 4 KiB.
HUGE_PAGE = 2 * MIB
STEPS = 5


def training_step(rows: int) -> Callable[[], int]:
    """A step that makes two outputs of 2 KiB a row, and gradients; the bytes of these."""
    x, logits = torch.randn(rows, 16), torch.randn(rows, 8)
    weights = [torch.randn(4, 64, 16).requires_grad_(), torch.randn(4, 512, 64).div_(8).requires_grad_()]
    cotangents = [torch.randn(1, 512).expand(rows, 512) for _ in range(2)]

    def step() -> int:
        outputs = mk.expert_mixture(x, weights, None, logits, mk.Routing.mmoe(4, 2))
        grads = torch.autograd.grad(outputs, weights, cotangents)
        return sum(t.nbytes for t in (*outputs, *grads))

    return step


def test_no_more_than_256_mib_are_kept_of_one_call() -> None:
    """Of results that are 480 MiB together, and of one that is more than that alone."""

    def mixture(mebibytes: int) -> object:
        rows = mebibytes * 256
        experts = torch.ones(1, 1, 1024).expand(rows, 1, 1024)
        return mk.gated_mixture(experts, torch.zeros(1, 1).expand(rows, 1), mk.Routing.mmoe(1, 1))

    for sizes, least in (([120] * 4, 120 * MIB), ([300], 0)):
        release()
        held = [mixture(size) for size in sizes]
        del held
        assert least <= release() <= MOST


def test_a_step_of_training_leaves_nothing_behind() -> None:
    """Its node in autograd's graph among it: that of twelve experts is 14 KiB."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    model, x = mk.nn.MMoE(16, 2, (12, 8), num_experts=12), torch.randn(8, 16)

    def steps(count: int) -> None:
        for _ in range(count):
            torch.autograd.grad([y.sum() for y in model(x)], list(model.parameters()))

    steps(200)
    before = resident()
    steps(1000)
    assert resident() - before < 4 * MIB


def test_nor_of_a_step_of_training() -> None:
    release()
    assert training_step(80_000)() > MOST
    assert 0 < release() <= MOST


def faults(step: Callable[[], object]) -> int:
    """Page faults of some steps."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def page_faults(rows: int) -> tuple[int, int, int]:
    """Of steps behind which memory is let go of, of others, and how many the former have at the least."""
    step = training_step(rows)
    result = [step() for _ in range(3)][-1]
    with_new_memory = faults(lambda: (step(), release()))
    for _ in range(3):  # a second one tells that the first was not the only one of its size
        step()
    return with_new_memory, faults(step), STEPS * result // HUGE_PAGE


@pytest.mark.parametrize("rows", [8192, 70_000], ids=["a little", "more than 256 MiB"])
def test_results_of_every_step_cost_no_page_faults(rows: int) -> None:
    """Beside steps behind which the memory is let go of, as a check that faults are counted at all.

    In a process of its own: in one that has freed as much before, memory that is let go of need not be the system's.
    """
    call = f"from tests.ops.test_memory import page_faults; print(*page_faults({rows}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=True)
    with_new_memory, again, least = map(int, done.stdout.split())
    assert with_new_memory >= least > 20
    assert again < with_new_memory / 10, f"{again} page faults, {with_new_memory} where nothing is kept"
