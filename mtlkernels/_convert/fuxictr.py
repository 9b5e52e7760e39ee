"""FuxiCTR: ``CGC_Layer``, a level of its PLE, and ``MMoE_Layer``; known by their structure.

Experts and gates are ``MLP_Block`` modules, an ``nn.Sequential`` of [Linear → (BatchNorm1d) → activation → (Dropout)] a
layer. PLE's shared gate, the last one, mixes the shared experts only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.chains import chains_of
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription
from mtlkernels.routing import Routing

_chains = functools.partial(chains_of, lambda kind: kind.__name__ == "MLP_Block")


def _routing(module: Any) -> Routing:
    wiring = Routing.cgc(module.num_tasks, module.num_specific_experts, module.num_shared_experts)
    experts = module.num_tasks * module.num_specific_experts
    shared = tuple(range(experts, experts + module.num_shared_experts))
    return Routing(wiring.expert_inputs, (*wiring.gate_experts, shared))


def _inputs(module: Any, x: Sequence[Tensor], require_gate: bool = False) -> Sequence[Tensor] | None:
    """None where the caller wants the gates' weights too."""
    return None if require_gate else [*x[: module.num_tasks], x[-1]]


def _gates(module: Any) -> list[Any]:
    """None where something else than a softmax follows them."""
    activation = module.gate_activation
    return [[chain, activation] for chain in _chains(module.gate)] if _torch.class_of(activation) is nn.Softmax else []


# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    "CGC_Layer": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module.specific_experts, module.shared_experts),
            gates=_gates,
            routing=_routing,
        ),
        inputs=_inputs,
        arguments=lambda module, streams: (list(streams),),
    ),
    "MMoE_Layer": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module.experts),
            gates=_gates,
            routing=lambda module: Routing.mmoe(module.num_experts, module.num_tasks),
        )
    ),
}
