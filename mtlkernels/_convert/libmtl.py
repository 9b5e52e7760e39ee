"""LibMTL: the architectures ``MMoE`` and ``CGC`` with encoders that are plain MLPs; known by their structure.

A gate is an ``nn.Sequential`` of Linear and Softmax, and mixes shared experts first. Heads are called as they are. A
call for one task alone runs LibMTL's own code, which evaluates no other task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription, cgc, children
from mtlkernels.routing import Routing


def _gates(module: Any) -> list[Chain]:
    return [module.gate_specific[task] for task in module.task_name]


def _cgc_experts(module: Any) -> list[Chain]:
    return children(*(module.experts_specific[task] for task in module.task_name), module.experts_shared)


def _cgc_routing(module: Any) -> Routing:
    specific = (module.experts_specific[task] for task in module.task_name)
    return cgc(specific, module.experts_shared, shared_first=True, single_input=True)


def _inputs(module: Any, inputs: Tensor, task_name: str | None = None) -> Tensor | None:
    return inputs if task_name is None else None


def _outputs(module: Any, mixed: Sequence[Tensor]) -> dict[str, Any]:
    """Through ``_prepare_rep``, by which LibMTL gets at gradients of representations, and the tasks' heads."""
    representations = zip(module.task_name, mixed, strict=True)
    return {task: module.decoders[task](module._prepare_rep(x, task, same_rep=False)) for task, x in representations}


# Where ``_prepare_rep`` keeps representations of a batch, and their copies that take gradients.
_WRITES = ("rep", "rep_tasks")
# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    "MMoE": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: children(module.experts_shared),
            gates=_gates,
            routing=lambda module: Routing.mmoe(len(module.experts_shared), len(module.task_name)),
        ),
        inputs=_inputs,
        outputs=_outputs,
        writes=_WRITES,
    ),
    "CGC": TrunkDescription.of(
        LevelDescription(_cgc_experts, _gates, _cgc_routing), inputs=_inputs, outputs=_outputs, writes=_WRITES
    ),
}
