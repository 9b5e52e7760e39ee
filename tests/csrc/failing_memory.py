"""Calls of every operator in which an allocation fails; ``test_failing_memory.py`` preloads failing.cpp and runs this.

For n = 1, 2, ... the n-th allocation of a call fails that the C++ kernels make, or that torch makes for them, until a
call needs fewer. Each raises or succeeds, and what follows is right.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys
from collections.abc import Callable

import torch

from mtlkernels import _extension
from tests.ops.calls import Results, calls

MODULE = f"mtlkernels.lib.{_extension.place(torch.__version__).name}._C"
EXPORTED = "_ZN4mtlk25compiled_instruction_setsEv"  # a function of the operators' library


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
