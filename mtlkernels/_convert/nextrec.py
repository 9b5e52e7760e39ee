"""nextrec: the levels of ``PLE``, of class ``CGCLayer``, and ``MMOE``.

An expert is an ``MLP``, an ``nn.Sequential`` of [Linear → (BatchNorm1d or LayerNorm) → activation → Dropout] a layer; a
gate is an ``nn.Sequential`` of Linear and Softmax. A task's gate has shared experts first, the shared one last.
Its classes are told by their names, so that the library, which takes seconds to import, is not imported here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from mtlkernels._convert.activations import full_name
from mtlkernels._convert.chains import chains_of
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription, cgc, children
from mtlkernels.routing import Routing

_chains = functools.partial(chains_of, lambda kind: full_name(kind) == "nextrec.basic.layers.MLP")


# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    "CGCLayer": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module._modules["specific_experts"], module._modules["shared_experts"]),
            gates=lambda module: [*children(module._modules["task_gates"]), module._modules["shared_gate"]],
            routing=lambda module: cgc(
                module.specific_experts, module.shared_experts, shared_gate=True, shared_first=True
            ),
        ),
        # The library refuses another number of streams than it has tasks.
        inputs=lambda module, task_inputs, shared_input: (
            [*task_inputs, shared_input] if len(task_inputs) == module.nums_task else None
        ),
        arguments=lambda module, streams: (list(streams[:-1]), streams[-1]),
        outputs=lambda module, mixed: (list(mixed[:-1]), mixed[-1]),
    ),
    # A trial's copy has an embedding that gives back what it gets.
    "MMOE": TrunkDescription.of(
        LevelDescription(
            experts=lambda model: _chains(model._modules["experts"]),
            gates=lambda model: children(model._modules["gates"]),
            routing=lambda model: Routing.mmoe(len(model.experts), len(model.gates)),
            parts=lambda model: (model._modules["experts"], model._modules["gates"]),
        ),
        inputs=lambda model, x: model.embedding(x=x, features=model.all_features, squeeze_dim=True),
        outputs=lambda model, mixed: torch.cat([tower(x) for tower, x in zip(model.towers, mixed, strict=True)], dim=1),
        embeds=True,
        trial=lambda model: {"without": ("embedding",)},
    ),
}
