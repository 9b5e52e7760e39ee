"""Calls of every operator in which an allocation fails; ``test_failing_memory.py`` preloads failing.cpp and runs this.

For n = 1, 2, ... the n-th allocation of a call fails that the C++ kernels make, or that torch makes for them, until a
call needs fewer. Each raises or succeeds, and what follows is right.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import Case, CaseFactory, evaluate
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops.level import gate_layers, normalized

ROUTING = mk.Routing.cgc(2, 1, 1)
NORMS = ((("batch", "none"), "relu"), (("none", "layer"), "prelu"), (("none", "none"), "dice"))
WIDTHS = (24, 40, 80)
Results = dict[str, list[Tensor]]
MODULE = f"mtlkernels.lib.{_extension.place(torch.__version__).name}._C"
EXPORTED = "_ZN4mtlk25compiled_instruction_setsEv"  # a function of the operators' library


def calls(dropout: float = 0.2) -> dict[str, Callable[[], Results]]:
    """Calls by name; their results are large enough for the pool of memory, and some threads have work to share."""
    found: dict[str, Callable[[], Results]] = {}

    def add(name: str, op: Callable[..., Any], case: Case) -> None:
        found[name] = functools.partial(evaluate, op, case)
        if case.leaves():
            found[f"{name}, serving"] = functools.partial(evaluate, op, case.map(Tensor.detach))

    for dtype, rows in ((torch.float32, 3), (torch.float32, 64), (torch.bfloat16, 200)):
        make = CaseFactory(rows, dtype)
        add(f"expert_mixture, {dtype}, {rows} rows", mk.expert_mixture, make.expert_mixture(rows, WIDTHS, ROUTING))
    make = CaseFactory(0, torch.float32)
    add("gate layers", gate_layers.by_layers, gate_layers.with_layers(make, 64, WIDTHS))
    for kinds, activation in NORMS:
        case = normalized.case(make, 64, WIDTHS, ROUTING, kinds, activation=activation, dropout=[dropout, 0.0])
        add(f"norms, {kinds}, {activation}", normalized.fused, case)
    add("gated_mixture", mk.gated_mixture, make.gated_mixture(70, 90, ROUTING))
    add("snr_trans", mk.snr_trans, snr_trans(make, 70, [24, 33], [90, 7, 80]))
    add("stacked snr_trans", mk.snr_trans, snr_trans(make, 70, [24] * 2, [90] * 3, stacked=True))
    add("snr_aver", mk.snr_aver, snr_aver(make, 140, 50, 3, 2))
    grads = [[make.leaf(5000, requires_grad=False), make.leaf(70, 70, requires_grad=False)] for _ in range(3)]
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    found["pcgrad"] = lambda: {"grads": [grad for grad in mk.pcgrad(grads, order=order) if grad is not None]}
    return found


def check(name: str, call: Callable[[], Results], memory: ctypes.CDLL, all_after: bool, step: int) -> int:
    """Fails every ``step``-th allocation of a call in turn; how many there were."""
    expected = call()
    for n in range(1, 100_000, step):
        print(f"{name}: allocation {n}{' and all after it' if all_after else ''}", flush=True)
        results = None
        memory.arm(n, all_after)
        try:
            results = call()
        except (MemoryError, RuntimeError):
            pass
        finally:
            failed = memory.disarm()
        for found in (results, call()):
            for group, want in expected.items():
                same = found is None or all(map(torch.equal, found[group], want))
                assert same, f"{name}: {group} differ after allocation {n} has failed"
        if not failed:
            assert results is not None, f"{name}: raised though no allocation had failed"
            return n
    raise AssertionError(f"{name}: there is no end of allocations")


def main(threads: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(threads)
    memory = ctypes.CDLL(None)
    memory.arm.argtypes = [ctypes.c_long, ctypes.c_bool]
    memory.disarm.restype = ctypes.c_long
    module = ctypes.PyDLL(str(sys.modules[MODULE].__file__))
    memory.watch(ctypes.cast(module.PyInit__C, ctypes.c_void_p))
    memory.watch(ctypes.cast(getattr(ctypes.CDLL(str(_extension.operator_library())), EXPORTED), ctypes.c_void_p))
    for name, call in calls().items():
        # Several threads make hardly more allocations than one: of them every seventh is enough.
        for all_after, step in ((False, 1 if threads == 1 else 7), (True, 11 if threads == 1 else 29)):
            check(name, call, memory, all_after, step)
    print("all calls have passed", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
