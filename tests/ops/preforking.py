"""Forks by a process that has computed on several threads, as servers that load a model before they fork their workers;
``test_forks.py`` runs this in a process of its own.

The children compute on as many threads, without another word to PyTorch, and so do theirs.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tests.ops.children import ended

THREADS = 2


def in_child(work: Callable[[], bool]) -> bool:
    """Whether a child has said so, in time."""
    pid = os.fork()
    if pid:
        how = ended(pid)
        print(how, end="\n" if how else "", flush=True)
        return not how
    well = False
    try:
        well = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(not well)


def many_threads() -> bool:
    """Whether this process has the threads that it computes on."""
    return len(os.listdir("/proc/self/task")) >= THREADS


def after_calls() -> bool:
    """Children and theirs get the results of their parent, of PyTorch's operators and of ours."""
    from tests.ops.forking import calls

    x = torch.randn(300, 300)

    def results() -> list[Tensor]:
        return [x.exp(), x @ x, *calls()]

    expected = results()

    def same() -> bool:
        return all(map(torch.equal, results(), expected)) and many_threads()

    return many_threads() and in_child(same) and in_child(lambda: same() and in_child(same)) and same()


def loaded_in_a_child() -> bool:
    """A child whose runtime waits for threads that it has not may load the package, and fork too, as before."""
    torch.randn(300, 300).exp()

    def work() -> bool:
        assert "mtlkernels" not in sys.modules
        import mtlkernels as mk

        torch.set_num_threads(1)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return mk is not None and in_child(lambda: True)

    return in_child(work)


def main() -> int:
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # so it is meant to be
    torch.set_num_threads(THREADS)
    return 0 if loaded_in_a_child() and after_calls() else 1


if __name__ == "__main__":
    sys.exit(main())
