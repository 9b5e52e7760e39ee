"""The trunks that are compared: one rule for their widths, so that all have about as many parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

import mtlkernels as mk
from benchmarks.demo.flights import TASKS

MMOE, PLE, TRANS, AVER = "MMoE", "PLE", "SNR-Trans", "SNR-Aver"
EXPERTS, UNITS = 6, (64, 32)  # of the MMoE, as in PCGrad's ablation
SUBNETS = (4, 4)  # as many a level as the PLE has experts: one a task and one that is shared
WEIGHTS = (0.0, 0.02, 0.1, 0.3)  # of the L0 penalty; from a pilot, so that from all to few routes stay open


@dataclass(frozen=True)
class Variant:
    """A trunk, and how its routes are trained.

    Args:
        kind: the trunk.
        weight: what the expected share of open routes costs, in units of the summed losses.
        sampled: whether z is sampled in training, as SNR has it; otherwise it is what it is at test time.
    """

    kind: str
    weight: float = 0.0
    sampled: bool = True

    @property
    def routed(self) -> bool:
        """Whether it has routes at all."""
        return self.kind in (TRANS, AVER)

    @property
    def name(self) -> str:
        if not self.routed:
            return self.kind
        return f"{self.kind}, L0 {self.weight:g}{'' if self.sampled else ', not sampled'}"


VARIANTS = (
    Variant(MMOE),
    Variant(PLE),
    *(
        variant
        for kind in (TRANS, AVER)
        for variant in (Variant(kind, sampled=False), *(Variant(kind, weight) for weight in WEIGHTS))
    ),
)
BASELINE = VARIANTS[0]


def _of_width(kind: str, features: int, width: int, device: str | None = None) -> nn.Module:
    """A trunk whose experts or sub-networks have layers of twice the width and of the width."""
    units = (2 * width, width)
    if kind == MMOE:
        return mk.nn.MMoE(features, len(TASKS), units, EXPERTS, device=device)
    if kind == PLE:
        return mk.nn.PLE(features, len(TASKS), units, num_specific=1, num_shared=1, num_levels=2, device=device)
    mode = {TRANS: "trans", AVER: "aver"}[kind]
    return mk.nn.SNR(features, len(TASKS), units, SUBNETS, mode, device=device)


def parameters(module: nn.Module) -> int:
    """How many a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def width(kind: str, features: int) -> int:
    """The multiple of eight with which the trunk has most nearly as many parameters as the MMoE.

    Others would come nearer by a few percent, and fill vectors badly, which shows in serving.
    """
    wanted = parameters(_of_width(MMOE, features, UNITS[-1], "meta"))
    return min(range(8, 65, 8), key=lambda width: abs(parameters(_of_width(kind, features, width, "meta")) - wanted))


def make(kind: str, features: int) -> Any:
    """The trunk of a kind."""
    return _of_width(kind, features, width(kind, features))
