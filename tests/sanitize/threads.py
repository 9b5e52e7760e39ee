"""Every op on many threads at once: ``python -m tests.sanitize.threads [ROUNDS]``.

Each result has to be, bit for bit, what the call gives alone on as many of PyTorch's threads, of which each of the
calling threads has a number of its own. Meanwhile another thread lets go of the memory that the kernels keep.
"""

from __future__ import annotations

import faulthandler
import functools
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import Case, CaseFactory, evaluate
from tests.ops import calls as every_op
from tests.ops.level.gate_layers import ROUTING
from tests.seeding import seed

CALLERS = 6
COUNTS = (1, 2, 3)  # of PyTorch's threads
DROPS_NOTHING = 1e-30  # by every seed: callers share the generator that seeds come from

Results = every_op.Results


@functools.cache
def served() -> tuple[mk.nn.PLE, Tensor]:
    """A prepared model and its input, which all callers share."""
    seed(0)
    model = mk.nn.PLE(40, 2, (48, 40), num_specific=1, num_shared=1, num_levels=2, batch_norm=True)
    return mk.prepare(model), torch.randn(200, 40)


def serve() -> Results:
    model, x = served()
    with torch.no_grad():
        return {"outputs": list(model(x))}


def calls() -> dict[str, Callable[[], Results]]:
    """By name, with tensors that nobody else has."""
    found = every_op.calls(dropout=DROPS_NOTHING)
    for dtype in (torch.float32, torch.bfloat16):
        large = CaseFactory(1, dtype).expert_mixture(700, (24, 40, 80), ROUTING, activation="relu")
        found[f"several blocks, {dtype}"] = functools.partial(evaluate, mk.expert_mixture, large)
        frozen: Case = large.map(Tensor.detach)
        found[f"several blocks, {dtype}, serving"] = functools.partial(evaluate, mk.expert_mixture, frozen)
    found["a prepared model"] = serve
    return found


def same(found: Results, expected: Results) -> bool:
    return all(torch.equal(a, b) for name in expected for a, b in zip(found[name], expected[name], strict=True))


def caller(number: int, rounds: int, expected: dict[int, dict[str, Results]], wrong: list[str]) -> None:
    count = COUNTS[number % len(COUNTS)]
    own = list(calls().items())
    order = random.Random(number)
    try:
        for _, call in own:
            call()  # by the first one on a thread each library takes over what any thread has set last
        torch.set_num_threads(count)
        for _ in range(rounds):
            order.shuffle(own)
            for name, call in own:
                if not same(call(), expected[count][name]):
                    wrong.append(f"{name} on {count} of PyTorch's threads gives other bits than alone")
        if torch.get_num_threads() != count:
            wrong.append("the number of PyTorch's threads is not the caller's own")
    except Exception:
        wrong.append(traceback.format_exc())


def main(rounds: int) -> int:
    faulthandler.enable()
    expected: dict[int, dict[str, Results]] = {}
    for count in COUNTS:
        torch.set_num_threads(count)
        expected[count] = {name: call() for name, call in calls().items()}
    wrong: list[str] = []
    callers = [threading.Thread(target=caller, args=(i, rounds, expected, wrong)) for i in range(CALLERS)]
    for thread in callers:
        thread.start()
    while any(thread.is_alive() for thread in callers):
        _extension.function("release_memory")()
        time.sleep(0.01)
    print(*sorted(set(wrong)), f"{CALLERS * rounds * len(expected[1]):,} calls", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
