"""The calls whose instructions are counted. As a program, run under callgrind, it makes them."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable, Iterator

import torch

import mtlkernels as mk
from benchmarks.harness.case import OURS, Case
from benchmarks.peers.shape import TrunkShape
from benchmarks.suites import mixture, pcgrad, snr
from mtlkernels import _extension

LEVEL = TrunkShape(128, num_tasks=2, num_specific=2, num_shared=2, units=(64, 32), last_shared_gate=True)
ROUTES = snr.RouteShape(rows=32, below=4, above=4, width=64)
MEANS = snr.RouteShape(rows=32, below=4, above=4, width=64, trans=False)
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
# Python rewrites its bytecode in the first dozen calls; the count is the mean over the others.
WARM_UP, COUNTED = 24, 4


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows in (1, 16, 96):
            yield mixture.case("level", LEVEL, rows, dtype, False, serving=True)
        for rows in (4, 96):
            yield mixture.case("level", LEVEL, rows, dtype, True)
        yield pcgrad.case("pcgrad", 4, 20_000, 10, dtype)
        for shape, workload in ((ROUTES, "snr_trans"), (MEANS, "snr_aver")):
            for training in (False, True):
                yield snr.case(workload, shape, 2, dtype, training, quick=False)


def _step_of(case: Case) -> Callable[[], None]:
    return next(contender for contender in case.build(CPU).contenders if contender.name == OURS).build()


def _gates(training: bool) -> Callable[[], None]:
    """Gates over experts that somebody else has evaluated."""
    torch.manual_seed(0)
    routing = mk.Routing.mmoe(6, 3)
    experts, logits = torch.randn(64, 6, 32), torch.randn(64, 18)
    experts.requires_grad_(training)
    logits.requires_grad_(training)
    cotangents = [torch.randn(64, 32) for _ in range(3)]

    def step() -> None:
        experts.grad = logits.grad = None
        outputs = mk.gated_mixture(experts, logits, routing)
        if training:
            torch.autograd.backward(outputs, cotangents)

    return step


def calls() -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes each call's step, by the call's name."""
    found: dict[str, Callable[[], Callable[[], None]]] = {}
    for case in _cases():
        found[case.title] = lambda case=case: _step_of(case)
    found["gated_mixture B=64 forward float32"] = lambda: _gates(False)
    found["gated_mixture B=64 forward+backward float32"] = lambda: _gates(True)
    return found


def instruction_set() -> str:
    """The widest that valgrind knows."""
    return "avx2" if "avx2" in _extension.instruction_sets() else _extension.instruction_sets()[0]


def settings() -> dict[str, str]:
    """What the counts depend on beside the code."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "compiler": _extension.build_facts()["compiler"],
        "instruction set": instruction_set(),
    }


def main() -> None:
    """Makes every call, and has callgrind write a file a call; prints the calls' names and the settings as JSON."""
    torch.set_num_threads(1)
    made = calls()
    with _extension.instruction_set(instruction_set()):
        for build in made.values():
            step = build()
            gc.collect()
            gc.disable()
            for _ in range(WARM_UP):
                step()
            torch._C._valgrind_toggle()
            for _ in range(COUNTED):
                step()
            torch._C._valgrind_toggle_and_dump_stats()
            gc.enable()
    print(json.dumps({"calls": list(made), "counted": COUNTED, "settings": settings()}))


if __name__ == "__main__":
    main()
