"""TorchEasyRec: ``ExtractionNet``, a level of its PLE, and ``MMoE``; known by their structure.

An expert is an ``MLP`` of ``Perceptron`` modules, each an ``nn.Sequential`` of [Linear → (BatchNorm1d) → activation →
(Dropout)].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels._convert.chains import Chain, leaves
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription, cgc, children
from mtlkernels.routing import Routing


def _chain(mlp: Any) -> Chain:
    """The modules of an MLP; anything else stands for itself, and is refused by its name."""
    if type(mlp).__name__ != "MLP" or mlp.return_hidden_layer_feature:
        return mlp
    return [layer._modules.get("perceptron", layer) for layer in children(mlp._modules["mlp"])]


def _chains(*modules: Any) -> list[Chain]:
    return list(map(_chain, leaves(*modules)))


def _ple_gates(module: Any) -> list[Chain]:
    gates = children(module._task_gates)
    return gates if module._shared_gate is None else [*gates, module._shared_gate]


def _ple_inputs(
    module: Any, extraction_network_fea: Sequence[Tensor], shared_expert_fea: Tensor | None
) -> list[Tensor] | None:
    if shared_expert_fea is not None:
        return [*extraction_network_fea, shared_expert_fea]
    # Without shared experts, nobody reads it at the last level.
    unread = len(module._shared_layers) == 0 and module._shared_gate is None
    return list(extraction_network_fea) if unread else None


def _ple_outputs(module: Any, mixed: Sequence[Tensor]) -> Any:
    tasks = len(module._task_gates)
    return list(mixed[:tasks]), mixed[tasks] if len(mixed) > tasks else None


def _mmoe_gates(module: Any) -> list[Chain]:
    finals = children(module.gate_finals)
    if not module.has_gate_mlp:
        return finals
    return [[hidden, final] for hidden, final in zip(_chains(module.gate_mlps), finals, strict=True)]


# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    "ExtractionNet": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module._task_layers, module._shared_layers),
            gates=_ple_gates,
            routing=lambda module: cgc(
                module._task_layers, module._shared_layers, shared_gate=module._shared_gate is not None
            ),
            num_streams=lambda module: len(module._task_gates) + 1,
        ),
        inputs=_ple_inputs,
        arguments=lambda module, streams: (list(streams[:-1]), streams[-1]),
        outputs=_ple_outputs,
    ),
    "MMoE": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module.expert_mlps),
            gates=_mmoe_gates,
            routing=lambda module: Routing.mmoe(len(module.expert_mlps), len(module.gate_finals)),
        )
    ),
}
