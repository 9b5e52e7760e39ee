"""How a call travels: the inputs pass through few files, each of them once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk

ROOT = str(Path(mk.__file__).parent)
# Whoever hands tensors to PyTorch asks here whether they have their memory: a look from the way, and no stop on it.
LOOKS_AT_MEMORY = "ops/_operands.py"


def files_that_get(value: Any, run: Any) -> list[str]:
    """The files of this package, in their order, whose functions get a value or a list with it before PyTorch does."""
    stays: list[str] = []

    def holds(given: Any, depth: int = 0) -> bool:
        if given is value:
            return True
        return depth < 3 and isinstance(given, (list, tuple)) and any(holds(item, depth + 1) for item in given)

    def profile(frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(ROOT) or "autograd.py" in stays[-1:]:
            return
        file = path[len(ROOT) + 1 :]
        if file == LOOKS_AT_MEMORY:
            return
        if any(map(holds, list(frame.f_locals.values()))) and stays[-1:] != [file]:
            stays.append("autograd.py" if frame.f_code.co_qualname.startswith("Level.") else file)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return stays[: stays.index("autograd.py")]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 a frame does not tell its function's class")
@pytest.mark.parametrize("linear_gates", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_checked_call(norm: bool, linear_gates: bool) -> None:
    routing = mk.Routing.cgc(2, 2, 1, single_input=True)
    x = torch.randn(6, 5, requires_grad=True)
    weights = [[torch.randn(b, a) for _ in range(routing.num_experts)] for a, b in ((5, 4), (4, 3))]
    sizes = [len(gate) for gate in routing.gate_experts]
    options: dict[str, Any] = {"gate_logits": [torch.randn(6, size) for size in sizes]}
    if linear_gates:
        options = {"gate_logits": None, "gate_weights": [torch.randn(size, 5) for size in sizes]}
    if norm:
        options["norms"] = [[torch.nn.LayerNorm(n) for _ in weights[0]] for n in (4, 3)]
    with mk.use_backend("reference"):
        files = files_that_get(x, lambda: mk.expert_mixture(x, weights, None, routing=routing, **options))
    assert len(set(files)) == len(files), files
    assert len(files) <= 6 + (norm and linear_gates), files  # such gates are layers in front of the level
