"""Forks while other threads are inside calls; ``test_forks.py`` runs this in a process of its own.

Each child makes the calls on one thread, as a DataLoader's workers do, and with tensors of its own, as PyTorch locks a
leaf where a graph is made of it; then it ends. One that waits for a lock which a
thread of the parent held never would: after a while it says where it waits, and the parent goes on without it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
import warnings

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory, evaluate
from mtlkernels.testing.snr import snr_trans
from tests.ops.children import HANGS, ended
from tests.ops.level.gate_layers import ROUTING

CHILDREN = 30
MAKE = CaseFactory(0, torch.float32)
LEVEL = MAKE.expert_mixture(64, (24, 32, 80), ROUTING, activation="relu")
SERVED = LEVEL.map(Tensor.detach)
ROUTES = snr_trans(MAKE, 40, [24, 16], [120, 8])
GRADS = [[torch.randn(5000), torch.randn(70, 70)] for _ in range(3)]
ORDER = torch.tensor([[1, 2], [2, 0], [0, 1]])


def own(case: Case) -> Case:
    return case.map(lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def calls() -> list[Tensor]:
    """Results that take memory of the pool, forward and backward."""
    found = [*evaluate(mk.expert_mixture, own(LEVEL)).values(), *evaluate(mk.snr_trans, own(ROUTES)).values()]
    with torch.no_grad():
        found.append(list(mk.expert_mixture(**SERVED.arguments)))
    found.append([grad for grad in mk.pcgrad(GRADS, order=ORDER) if grad is not None])
    return [tensor for group in found for tensor in group]


def child(expected: list[Tensor]) -> None:
    faulthandler.dump_traceback_later(HANGS / 2, exit=True)
    torch.set_num_threads(1)
    code = 1
    try:
        code = int(not all(map(torch.equal, calls(), expected)))  # by no function that has to be imported first
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    faulthandler.enable()
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # so it is meant to be
    torch.set_num_threads(1)
    expected = calls()
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            calls()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    outcomes = []
    for _ in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            child(expected)
        outcomes.append(ended(pid))
    over.set()
    for thread in threads:
        thread.join()
    failed = [f"child {number} {outcome}" for number, outcome in enumerate(outcomes) if outcome]
    print(*failed, f"{len(failed)} of {CHILDREN} children failed", sep="\n", flush=True)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
