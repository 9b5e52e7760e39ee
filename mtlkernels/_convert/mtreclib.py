"""MTReclib: ``PLEModel`` and ``MMoEModel``, whole models whose ``forward`` holds every level; known by their structure.

An expert is a ``MultiLayerPerceptron``, an ``nn.Sequential`` of [Linear → BatchNorm1d → ReLU → Dropout] a layer; one of
PLE has one layer, and levels may differ in width. A gate is an ``nn.Sequential`` of Linear and Softmax. The last shared
gate is there, and not evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.classes import PLAN, Converted, converted_class
from mtlkernels._convert.evaluation import evaluate
from mtlkernels._convert.level import Level, examine_parts, prepare, replaced_line
from mtlkernels._convert.report import Line
from mtlkernels._convert.trial import disagreement
from mtlkernels.routing import Routing

_FRONT = ("embedding", "numerical_layer")


def _chains(*modules: Any) -> list[Chain]:
    """The modules of each perceptron; anything else stands for itself."""
    found = [mlp for module in modules for mlp in module._modules.values()]
    return [mlp._modules["mlp"] if type(mlp).__name__ == "MultiLayerPerceptron" else mlp for mlp in found]


class FusedModel(Converted):
    """A model with its experts and gates as :class:`FusedLevel` has them; its plan is a Routing a level."""

    @staticmethod
    def levels(model: Any) -> list[Level]:
        """Where each level's parts are."""
        raise NotImplementedError

    @classmethod
    def planner(cls, base: type) -> Callable[[nn.Module, str], tuple[Any, list[Line]]]:
        """How :class:`Converter` plans for an instance of ``base``."""
        return functools.partial(_plan, cls, base)

    def forward(self: Any, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        """Codes [B, F] and numbers [B, N] → a prediction [B] a task."""
        levels = zip(self.levels(self), self._mtlkernels_plan, strict=True)
        parts = [prepare(level, self, routing, numerical_x) for level, routing in levels]
        if any(found is None for found in parts):
            original: list[Tensor] = super().forward(categorical_x, numerical_x)  # type: ignore[misc]
            return original
        numbers = self.numerical_layer(numerical_x).unsqueeze(1)
        x = torch.cat([self.embedding(categorical_x), numbers], 1).view(-1, self.embed_output_dim)
        streams: Sequence[Tensor] = [x] * (self.task_num + 1)
        for found in parts:
            streams = evaluate(found, streams)  # type: ignore[arg-type]
        return [torch.sigmoid(tower(x).squeeze(1)) for tower, x in zip(self.tower, streams, strict=False)]


def _plan(mixin: type[FusedModel], base: Any, module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    model: Any = module
    name = type(module).__name__
    if type(module).forward is not base.forward or "forward" in vars(module):
        return None, [Line("left alone", path, name, f"its forward is not that of {base.__name__}")]
    try:
        levels = mixin.levels(model)
        plan = [examine_parts(level, model, level.routing(model)) for level in levels]
        reason = next((found for found in plan if isinstance(found, str)), None)
    except Exception as error:  # of a structure that does not fit; it goes into the report
        reason = f"its description does not fit: {type(error).__name__}: {error}"
    if reason is None:
        reason = _trial(mixin, model, tuple(plan))
    if reason is not None:
        return None, [Line("left alone", path, name, reason)]
    parts = [f"{name} level {i}" if len(levels) > 1 else name for i in range(len(levels))]
    return tuple(plan), [replaced_line(level, model, path, part) for level, part in zip(levels, parts, strict=True)]


def _trial(mixin: type[FusedModel], model: Any, plan: tuple[Any, ...]) -> str | None:
    """What a trial finds wrong, of copies without what is in front of the experts."""

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        width = model.numerical_layer.out_features
        count = model.embed_output_dim // width
        x = torch.randn(rows, count, width, generator=generator, dtype=torch.float64)
        return x[:, :-1], x[:, -1]

    def fused(other: Any, *args: Any) -> Any:
        setattr(other, PLAN, plan)
        kind = type(other)
        other.__class__ = converted_class(mixin, kind)
        try:
            return other(*args)
        finally:
            other.__class__ = kind
            delattr(other, PLAN)

    return disagreement(model, fused, arguments, without=_FRONT)


def _ple_level(i: int, last: bool) -> Level:
    def gates(model: Any) -> list[Chain]:
        found = list(model.task_gates[i]._modules.values())
        return found if last else [*found, model.share_gates[i]]

    def routing(model: Any) -> Routing:
        specific = [len(experts) for experts in model.task_experts[i]]
        return Routing.cgc(len(specific), specific, len(model.share_experts[i]), shared_gate=not last)

    return Level(
        experts=lambda model: _chains(*model.task_experts[i]._modules.values(), model.share_experts[i]),
        gates=gates,
        routing=routing,
        parts=lambda model: (model.task_experts[i], model.share_experts[i], model.task_gates[i], model.share_gates[i]),
    )


class FusedPLEModel(FusedModel):
    """``PLEModel``."""

    @staticmethod
    def levels(model: Any) -> list[Level]:
        """The last one has no shared gate."""
        count = len(model.share_experts)
        return [_ple_level(i, i == count - 1) for i in range(count)]


class FusedMMoEModel(FusedModel):
    """``MMoEModel``."""

    @staticmethod
    def levels(model: Any) -> list[Level]:
        """One."""
        level = Level(
            experts=lambda model: _chains(model.expert),
            gates=lambda model: list(model.gate._modules.values()),
            routing=lambda model: Routing.mmoe(len(model.expert), len(model.gate)),
            parts=lambda model: (model.expert, model.gate),
        )
        return [level]


MIXINS: dict[str, type[FusedModel]] = {"PLEModel": FusedPLEModel, "MMoEModel": FusedMMoEModel}
