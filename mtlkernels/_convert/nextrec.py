"""nextrec: the levels of ``PLE``, of class ``CGCLayer``, and ``MMOE``.

An expert is an ``MLP``, an ``nn.Sequential`` of [Linear → (BatchNorm1d or LayerNorm) → activation → Dropout] a layer; a
gate is an ``nn.Sequential`` of Linear and Softmax. A task's gate has shared experts first, the shared one last.
Its classes are told by their names, so that the library, which takes seconds to import, is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.classes import Converter
from mtlkernels._convert.level import FusedLevel, Level, plan_level
from mtlkernels._convert.report import Line
from mtlkernels._convert.trunk import FusedTrunk, Trunk, plan_trunk
from mtlkernels.routing import Routing

_VERSIONS = ("0.6.14",)
_CGC = "nextrec.models.multitask.ple.CGCLayer"
_MMOE = "nextrec.models.multitask.mmoe.MMOE"
_MLP = "nextrec.basic.layers.MLP"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _chains(*modules: Any) -> list[Chain]:
    """The modules of each MLP; anything else stands for itself, and is refused by its name."""
    found = [expert for module in modules for expert in module._modules.values()]
    return [expert._modules["mlp"] if _full_name(type(expert)) == _MLP else expert for expert in found]


def _cgc_routing(module: Any) -> Routing:
    specific = [len(experts) for experts in module.specific_experts]
    shared = len(module.shared_experts)
    return Routing.cgc(len(specific), specific, shared, shared_gate=True, shared_first=True)


CGC_LEVEL = Level(
    experts=lambda module: _chains(*module._modules["specific_experts"]._modules.values(), module.shared_experts),
    gates=lambda module: [*module._modules["task_gates"]._modules.values(), module._modules["shared_gate"]],
    routing=_cgc_routing,
    # The library refuses another number of streams than it has tasks.
    inputs=lambda module, task_inputs, shared_input: (
        [*task_inputs, shared_input] if len(task_inputs) == module.nums_task else None
    ),
    arguments=lambda module, streams: (list(streams[:-1]), streams[-1]),
    outputs=lambda module, mixed: (list(mixed[:-1]), mixed[-1]),
)
MMOE_LEVEL = Level(
    experts=lambda model: _chains(model._modules["experts"]),
    gates=lambda model: list(model._modules["gates"]._modules.values()),
    routing=lambda model: Routing.mmoe(len(model.experts), len(model.gates)),
    parts=lambda model: (model._modules["experts"], model._modules["gates"]),
)


def _predictions(model: Any, streams: Sequence[Tensor]) -> Tensor:
    return torch.cat([tower(x) for tower, x in zip(model.towers, streams, strict=True)], dim=1)


def _example(model: Any, rows: int) -> tuple[Tensor]:
    """The embedded features, for a copy whose embedding gives back what it gets."""
    first = next(module for module in model.gates.modules() if isinstance(module, nn.Linear))
    return (torch.randn(rows, first.in_features),)


class FusedCGCLayer(FusedLevel):
    """``CGCLayer`` as one ``expert_mixture``."""

    _mtlkernels_level = CGC_LEVEL


class FusedMMOE(FusedTrunk):
    """``MMOE`` with its experts and gates as one ``expert_mixture``."""

    _mtlkernels_trunk = Trunk(
        levels=lambda model: (MMOE_LEVEL,),
        inputs=lambda model, x: model.embedding(x=x, features=model.all_features, squeeze_dim=True),
        outputs=_predictions,
        example=_example,
        without=("embedding",),
    )


def _refusal(module: nn.Module, path: str) -> Line | None:
    version = sys.modules["nextrec"].__version__
    if version in _VERSIONS:
        return None
    reason = f"nextrec {version} is not known, {', '.join(_VERSIONS)} is"
    return Line("left alone", path, type(module).__name__, reason)


def _library_class(module: nn.Module, name: str) -> type:
    return next(base for base in type(module).__mro__ if _full_name(base) == name)


def _plan_cgc(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    line = _refusal(module, path)
    return (None, [line]) if line is not None else plan_level(CGC_LEVEL, _library_class(module, _CGC), module, path)


def _plan_mmoe(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    line = _refusal(module, path)
    if line is not None:
        return None, [line]
    return plan_trunk(FusedMMOE._mtlkernels_trunk, _library_class(module, _MMOE), module, path)


CONVERTERS = {_CGC: Converter(_plan_cgc, FusedCGCLayer), _MMOE: Converter(_plan_mmoe, FusedMMOE)}
