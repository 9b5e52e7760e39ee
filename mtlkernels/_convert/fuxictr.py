"""FuxiCTR: ``CGC_Layer``, a level of its PLE, and ``MMoE_Layer``; known by their structure.

Experts and gates are ``MLP_Block`` modules, an ``nn.Sequential`` of [Linear → (BatchNorm1d) → activation → (Dropout)] a
layer. PLE's shared gate, the last one, mixes the shared experts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.level import FusedLevel, Level
from mtlkernels.routing import Routing


def _chains(*modules: Any) -> list[Chain]:
    """The modules of each MLP_Block; anything else stands for itself, and is refused by its name."""
    blocks = [block for module in modules for block in module._modules.values()]
    return [block._modules["mlp"] if type(block).__name__ == "MLP_Block" else block for block in blocks]


def _routing(module: Any) -> Routing:
    wiring = Routing.cgc(module.num_tasks, module.num_specific_experts, module.num_shared_experts)
    experts = module.num_tasks * module.num_specific_experts
    shared = tuple(range(experts, experts + module.num_shared_experts))
    return Routing(wiring.expert_inputs, (*wiring.gate_experts, shared))


def _inputs(module: Any, x: Sequence[Tensor], require_gate: bool = False) -> Sequence[Tensor] | None:
    """None where the caller wants the gates' weights too."""
    return None if require_gate else [*x[: module.num_tasks], x[-1]]


class FusedCGCLayer(FusedLevel):
    """``CGC_Layer`` as one ``expert_mixture``."""

    _mtlkernels_level = Level(
        experts=lambda module: _chains(*module.specific_experts._modules.values(), module.shared_experts),
        gates=lambda module: _chains(module.gate),
        routing=_routing,
        inputs=_inputs,
        arguments=lambda module, streams: (list(streams),),
    )


class FusedMMoELayer(FusedLevel):
    """``MMoE_Layer`` as one ``expert_mixture``."""

    _mtlkernels_level = Level(
        experts=lambda module: _chains(module.experts),
        gates=lambda module: _chains(module.gate),
        routing=lambda module: Routing.mmoe(module.num_experts, module.num_tasks),
    )


MIXINS: dict[str, type[FusedLevel]] = {"CGC_Layer": FusedCGCLayer, "MMoE_Layer": FusedMMoELayer}
