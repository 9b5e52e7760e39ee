"""Ctrl-C while calls run; ``test_interrupts.py`` runs this in a process of its own.

Another thread sends the signal while the main thread is inside a backward pass that has written nothing yet. The
handler, which Python runs once the kernels have returned, looks at the gradients that are there then, and raises
KeyboardInterrupt as Python's own does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import Case, CaseFactory
from mtlkernels.testing.snr import snr_trans

ATTEMPTS = 5
MAIN = threading.main_thread().ident or 0
ROUTING = mk.Routing.mmoe(8, 2)


class Backward:
    """The backward pass of a call, again and again."""

    def __init__(self, op: Callable[..., Any], case: Case) -> None:
        self.op, self.case = op, case
        self.leaves = [leaf for leaves in case.leaves().values() for leaf in leaves]
        self.outputs: list[Tensor] = []
        self.again()
        self.cotangents = [torch.ones_like(y) for y in self.outputs]
        self.run()
        self.expected = self.grads()

    def again(self) -> None:
        """The forward pass, without gradients of before."""
        for leaf in self.leaves:
            leaf.grad = None
        self.outputs = list(self.op(**self.case.arguments))

    def run(self) -> None:
        torch.autograd.backward(self.outputs, self.cotangents)

    def grads(self) -> list[Tensor]:
        """Those that are there."""
        return [leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None]

    def whole(self, grads: list[Tensor]) -> bool:
        return len(grads) == len(self.expected) and all(map(torch.equal, grads, self.expected))


def interrupted(call: Backward) -> tuple[bool, list[Tensor]]:
    """Whether the signal came before the call had written anything, and the gradients when it was answered."""
    running = threading.Event()
    seen: list[list[Tensor]] = []
    before: list[bool] = []

    def answer(number: int, frame: Any) -> None:
        seen.append(call.grads())
        signal.default_int_handler(number, frame)

    def send() -> None:
        running.wait()
        time.sleep(0.01)
        before.append(all(leaf.grad is None for leaf in call.leaves))
        signal.pthread_kill(MAIN, signal.SIGINT)

    usual = signal.signal(signal.SIGINT, answer)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        running.set()
        call.run()
        thread.join()
        time.sleep(0.1)  # for a signal that came only now
    except KeyboardInterrupt:
        thread.join()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert len(seen) == 1, "Ctrl-C was not answered"
    return before[0], seen[0]


def check(name: str, call: Backward, written_by_cpp: bool) -> None:
    """``written_by_cpp``: no Python runs between the kernels and the gradients, so that all of these are there."""
    for _ in range(ATTEMPTS):
        call.again()
        during, found = interrupted(call)
        assert call.whole(found) or not (found or written_by_cpp), f"{name}: {len(found)} gradients, not whole"
        now = call.grads()
        assert call.whole(now) or not now, f"{name}: gradients are not whole"
        call.again()
        call.run()
        assert call.whole(call.grads()), f"{name}: the next call is wrong"
        if during:
            return
    raise AssertionError(f"{name}: no signal came during a call")  # all of them came late


def main() -> None:
    torch.set_num_threads(2)
    make = CaseFactory(0, torch.float32)
    level = make.expert_mixture(10_000, [128, 128, 128], ROUTING)
    check("expert_mixture", Backward(mk.expert_mixture, level), written_by_cpp=_extension.has_module())
    check("gated_mixture", Backward(mk.gated_mixture, make.gated_mixture(100_000, 32, ROUTING)), written_by_cpp=False)
    check("snr_trans", Backward(mk.snr_trans, snr_trans(make, 10_000, [128] * 4, [128] * 4)), written_by_cpp=False)


if __name__ == "__main__":
    main()
