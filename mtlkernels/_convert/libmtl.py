"""LibMTL: the architectures ``MMoE`` and ``CGC`` with encoders that are plain MLPs; known by their structure.

A gate is an ``nn.Sequential`` of Linear and Softmax, and mixes shared experts first. Heads are called as they are. A
call for one task alone runs LibMTL's own code, which evaluates no other task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.level import FusedLevel, Level
from mtlkernels.routing import Routing


def _children(module: Any) -> list[Chain]:
    return list(module._modules.values())


def _gates(module: Any) -> list[Chain]:
    return [module.gate_specific[task] for task in module.task_name]


def _cgc_experts(module: Any) -> list[Chain]:
    specific = [expert for task in module.task_name for expert in _children(module.experts_specific[task])]
    return specific + _children(module.experts_shared)


def _cgc_routing(module: Any) -> Routing:
    specific = [len(module.experts_specific[task]) for task in module.task_name]
    return Routing.cgc(len(specific), specific, len(module.experts_shared), shared_first=True, single_input=True)


def _inputs(module: Any, inputs: Tensor, task_name: str | None = None) -> tuple[Tensor, ...] | None:
    return (inputs,) if task_name is None else None


def _outputs(module: Any, mixed: Sequence[Tensor]) -> dict[str, Any]:
    """Through ``_prepare_rep``, by which LibMTL gets at gradients of representations, and the tasks' heads."""
    representations = zip(module.task_name, mixed, strict=True)
    return {task: module.decoders[task](module._prepare_rep(x, task, same_rep=False)) for task, x in representations}


class FusedLibMTLMMoE(FusedLevel):
    """``MMoE`` with its trunk one ``expert_mixture``."""

    _mtlkernels_level = Level(
        experts=lambda module: _children(module.experts_shared),
        gates=_gates,
        routing=lambda module: Routing.mmoe(len(module.experts_shared), len(module.task_name)),
        inputs=_inputs,
        outputs=_outputs,
    )


class FusedLibMTLCGC(FusedLevel):
    """``CGC`` with its trunk one ``expert_mixture``."""

    _mtlkernels_level = Level(
        experts=_cgc_experts, gates=_gates, routing=_cgc_routing, inputs=_inputs, outputs=_outputs
    )


MIXINS: dict[str, type[FusedLevel]] = {"MMoE": FusedLibMTLMMoE, "CGC": FusedLibMTLCGC}
