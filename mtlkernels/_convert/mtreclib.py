"""MTReclib: ``PLEModel`` and ``MMoEModel``, whole models whose ``forward`` holds every level; known by their structure.

An expert is a ``MultiLayerPerceptron``, an ``nn.Sequential`` of [Linear → BatchNorm1d → ReLU → Dropout] a layer; one of
PLE has one layer, and levels may differ in width. A gate is an ``nn.Sequential`` of Linear and Softmax. The last shared
gate is there, and not evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels._convert.chains import chains_of
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription, cgc, children
from mtlkernels.routing import Routing

_chains = functools.partial(chains_of, lambda kind: kind.__name__ == "MultiLayerPerceptron")


def _inputs(model: Any, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
    """Codes [B, F] and numbers [B, N] → the same embedding for each task and for the shared experts."""
    numbers = model.numerical_layer(numerical_x).unsqueeze(1)
    x = torch.cat([model.embedding(categorical_x), numbers], 1).view(-1, model.embed_output_dim)
    return [x] * (model.task_num + 1)


def _outputs(model: Any, streams: Sequence[Tensor]) -> list[Tensor]:
    """A prediction [B] a task."""
    return [torch.sigmoid(tower(x).squeeze(1)) for tower, x in zip(model.tower, streams, strict=False)]


def _ple_level(i: int, last: bool) -> LevelDescription:
    return LevelDescription(
        experts=lambda model: _chains(model.task_experts[i], model.share_experts[i]),
        gates=lambda model: children(model.task_gates[i]) + ([] if last else [model.share_gates[i]]),
        routing=lambda model: cgc(model.task_experts[i], model.share_experts[i], shared_gate=not last),
        parts=lambda model: (model.task_experts[i], model.share_experts[i], model.task_gates[i], model.share_gates[i]),
    )


def _ple_levels(model: Any) -> list[LevelDescription]:
    """The last one has no shared gate."""
    count = len(model.share_experts)
    return [_ple_level(i, i == count - 1) for i in range(count)]


_MMOE_LEVEL = LevelDescription(
    experts=lambda model: _chains(model.expert),
    gates=lambda model: children(model.gate),
    routing=lambda model: Routing.mmoe(len(model.expert), len(model.gate)),
    parts=lambda model: (model.expert, model.gate),
)
_AROUND: dict[str, Any] = {
    "inputs": _inputs,
    "outputs": _outputs,
    # Of a copy whose embeddings give back what they get.
    "arguments": lambda model, streams: (streams[0][:, :-1].unsqueeze(2), streams[0][:, -1:]),
    "embeds": True,
    "trial": lambda model: {"without": ("embedding", "numerical_layer")},
}


# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    "PLEModel": TrunkDescription(_ple_levels, **_AROUND),
    "MMoEModel": TrunkDescription.of(_MMOE_LEVEL, **_AROUND),
}
