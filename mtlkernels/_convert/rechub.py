"""torch-rechub: the levels of ``PLE``, of class ``CGC``, and ``MMOE``.

Experts and gates are ``MLP`` modules, an ``nn.Sequential`` of [Linear → BatchNorm1d → activation → Dropout] a layer; a
gate has one such layer, with a softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_rechub.basic.layers import MLP
from torch_rechub.models.multi_task.mmoe import MMOE
from torch_rechub.models.multi_task.ple import CGC

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.classes import Converted, Converter
from mtlkernels._convert.evaluation import evaluate
from mtlkernels._convert.level import FusedLevel, Level, examine, plan_level, prepare, replaced_line, width_of
from mtlkernels._convert.report import Line
from mtlkernels._convert.trial import disagreement
from mtlkernels.routing import Routing

_VERSIONS = ("0.9.0",)


def _chain(mlp: Any) -> Chain:
    """The modules of an MLP; anything else stands for itself, and is refused by its name."""
    return mlp._modules["mlp"] if type(mlp) is MLP else mlp


def _chains(*modules: Any) -> list[Chain]:
    return [_chain(mlp) for module in modules for mlp in module._modules.values()]


def _cgc_gates(module: Any) -> list[Chain]:
    gates = _chains(module._modules["gates_specific"])
    return gates + [_chain(module._modules["gate_shared"])] if module.cur_level < module.n_level else gates


def _cgc_routing(module: Any) -> Routing:
    shared_gate = module.cur_level < module.n_level
    return Routing.cgc(module.n_task, module.n_expert_specific, module.n_expert_shared, shared_gate=shared_gate)


CGC_LEVEL = Level(
    experts=lambda module: _chains(module._modules["experts_specific"], module._modules["experts_shared"]),
    gates=_cgc_gates,
    routing=_cgc_routing,
    # The shared experts and the shared gate read the last stream.
    inputs=lambda module, x_list: [*x_list[: module.n_task], x_list[-1]],
    arguments=lambda module, streams: (list(streams),),
)
MMOE_LEVEL = Level(
    experts=lambda module: _chains(module._modules["experts"]),
    gates=lambda module: _chains(module._modules["gates"]),
    routing=lambda module: Routing.mmoe(module.n_expert, module.n_task),
    parts=lambda module: (module._modules["experts"], module._modules["gates"]),
)


class FusedCGC(FusedLevel):
    """``CGC`` as one ``expert_mixture``."""

    _mtlkernels_level = CGC_LEVEL


class FusedMMOE(Converted):
    """``MMOE`` with its experts and gates as :class:`FusedLevel` has them; its plan is the Routing."""

    def forward(self: Any, x: Any) -> Tensor:
        """Features by name → predictions [B, T]."""
        parts = prepare(MMOE_LEVEL, self, self._mtlkernels_plan, x[self.features[0].name])
        if parts is None:
            original: Tensor = super().forward(x)  # type: ignore[misc]
            return original
        return _predictions(self, evaluate(parts, [self.embedding(x, self.features, squeeze_dim=True)]))


def _predictions(model: Any, mixed: Sequence[Tensor]) -> Tensor:
    """What MMOE makes of the gates' mixtures."""
    heads = zip(mixed, model.towers, model.predict_layers, strict=True)
    return torch.cat([predict(tower(hidden)) for hidden, tower, predict in heads], dim=1)


def _version_line(module: nn.Module, path: str) -> Line | None:
    version = sys.modules["torch_rechub"].__version__
    if version in _VERSIONS:
        return None
    reason = f"torch-rechub {version} is not known, {', '.join(_VERSIONS)} is"
    return Line("left alone", path, type(module).__name__, reason)


def _plan_cgc(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    model: Any = module
    line = _version_line(module, path)
    if line is None and model.n_expert_shared < 1 and model.cur_level < model.n_level:
        # Fused, such a gate would get gradients of zero instead of None, which an optimizer may tell apart.
        reason = "without shared experts nothing trains its shared gate"
        line = Line("left alone", path, type(module).__name__, reason)
    return (None, [line]) if line is not None else plan_level(CGC_LEVEL, CGC, module, path)


def _plan_mmoe(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    line = _version_line(module, path)
    if line is not None:
        return None, [line]
    routing = examine(MMOE_LEVEL, MMOE, module)
    reason = routing if isinstance(routing, str) else _trial_mmoe(module, routing)
    if reason is not None:
        return None, [Line("left alone", path, type(module).__name__, reason)]
    return routing, [replaced_line(MMOE_LEVEL, module, path)]


def _trial_mmoe(module: nn.Module, routing: Routing) -> str | None:
    """What a trial finds wrong, of copies that take the features' embeddings themselves."""

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(rows, width_of(MMOE_LEVEL, other), generator=generator, dtype=torch.float64),)

    def fused(other: Any, x: Tensor) -> Tensor:
        return _predictions(other, evaluate(prepare(MMOE_LEVEL, other, routing, x), [x]))  # type: ignore[arg-type]

    # Features keep their embeddings.
    return disagreement(module, fused, arguments, without=("embedding", "features"))


CONVERTERS = {
    "torch_rechub.models.multi_task.ple.CGC": Converter(_plan_cgc, FusedCGC),
    "torch_rechub.models.multi_task.mmoe.MMOE": Converter(_plan_mmoe, FusedMMOE),
}
