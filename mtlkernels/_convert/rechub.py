"""torch-rechub: the levels of ``PLE``, of class ``CGC``, and ``MMOE``.

Experts and gates are ``MLP`` modules, an ``nn.Sequential`` of [Linear → BatchNorm1d → activation → Dropout] a layer; a
gate has one such layer, with a softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_rechub.basic.layers import MLP

from mtlkernels._convert.chains import Chain, chains_of
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription
from mtlkernels.routing import Routing

_chains = functools.partial(chains_of, lambda kind: kind is MLP)


def _cgc_gates(module: Any) -> list[Chain]:
    names = ("gates_specific", "gate_shared") if module.cur_level < module.n_level else ("gates_specific",)
    return _chains(*(module._modules[name] for name in names))


def _cgc_routing(module: Any) -> Routing:
    shared_gate = module.cur_level < module.n_level
    return Routing.cgc(module.n_task, module.n_expert_specific, module.n_expert_shared, shared_gate=shared_gate)


def _cgc_refusal(module: Any) -> str | None:
    """Fused, such a gate would get gradients of zero instead of None, which an optimizer may tell apart."""
    untrained = module.n_expert_shared < 1 and module.cur_level < module.n_level
    return "without shared experts nothing trains its shared gate" if untrained else None


def _predictions(model: Any, mixed: Sequence[Tensor]) -> Tensor:
    """What MMOE makes of the gates' mixtures."""
    heads = zip(mixed, model.towers, model.predict_layers, strict=False)  # as the library
    return torch.cat([predict(tower(hidden)) for hidden, tower, predict in heads], dim=1)


# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    # Its shared experts and its shared gate read the last stream.
    "CGC": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module._modules["experts_specific"], module._modules["experts_shared"]),
            gates=_cgc_gates,
            routing=_cgc_routing,
        ),
        inputs=lambda module, x_list: [*x_list[: module.n_task], x_list[-1]],
        arguments=lambda module, streams: (list(streams),),
        refusal=_cgc_refusal,
    ),
    # A trial's copies take the features' embeddings themselves, as features keep their embeddings.
    "MMOE": TrunkDescription.of(
        LevelDescription(
            experts=lambda module: _chains(module._modules["experts"]),
            gates=lambda module: _chains(module._modules["gates"]),
            routing=lambda module: Routing.mmoe(module.n_expert, module.n_task),
            parts=lambda module: (module._modules["experts"], module._modules["gates"]),
        ),
        inputs=lambda model, x: model.embedding(x, model.features, squeeze_dim=True),
        outputs=_predictions,
        embeds=True,
        trial=lambda model: {"without": ("embedding", "features")},
    ),
}
