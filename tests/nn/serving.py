"""Trunks that serve until their calls are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.nn.level import TrunkLevel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRUNKS: dict[str, Callable[..., Any]] = {
    "MMoE": lambda **options: mk.nn.MMoE(20, 3, (24, 16), num_experts=4, **options),
    "CGC": lambda **options: mk.nn.CGC(20, 2, (24,), num_specific=2, num_shared=1, **options),
    "PLE": lambda **options: mk.nn.PLE(20, 2, (24, 20), num_specific=1, num_shared=2, num_levels=2, **options),
}


def levels(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TrunkLevel)]


def keeps(level: Any) -> bool:
    return level._calls._kept is not None or level._calls._trunk is not None


def are_kept(model: nn.Module) -> bool:
    return all(map(keeps, levels(model)))


def serve(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(x))


def kept(name: str = "PLE", kind: torch.dtype = torch.float32, **options: Any) -> Any:
    """A trunk that has served until its calls are kept."""
    model = TRUNKS[name](**options).to(kind).eval()
    for _ in range(2):
        assert not are_kept(model)
        serve(model, torch.ones(3, 20, dtype=kind))
    assert are_kept(model)
    return model


def fresh(model: Any) -> Any:
    """A copy, of which nothing is kept."""
    found = copy.deepcopy(model)
    assert not any(map(keeps, levels(found)))
    return found


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
