"""Which classes can be converted: those of libraries, found without importing one, and those that users register."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn

from mtlkernels._convert.classes import Converter
from mtlkernels._convert.trunk import FusedTrunk, Trunk, plan_trunk

# Class -> the module with its converter in ``CONVERTERS``. That module may import the library: it is there already.
_MODULES = {
    "deepctr_torch.models.multitask.ple.PLE": "mtlkernels._convert.deepctr",
    "deepctr_torch.models.multitask.mmoe.MMOE": "mtlkernels._convert.deepctr",
    "nextrec.models.multitask.mmoe.MMOE": "mtlkernels._convert.nextrec",
    "nextrec.models.multitask.ple.CGCLayer": "mtlkernels._convert.nextrec",
    "torch_rechub.models.multi_task.ple.CGC": "mtlkernels._convert.rechub",
    "torch_rechub.models.multi_task.mmoe.MMOE": "mtlkernels._convert.rechub",
}
# Of libraries that are copied rather than installed, whose modules may be anywhere: class, what an instance has,
# and the module with its mix-in in ``MIXINS``.
_STRUCTURES = (
    ("ExtractionNet", ("_task_layers", "_shared_layers", "_task_gates", "_shared_gate"), "mtlkernels._convert.easyrec"),
    ("MMoE", ("expert_mlps", "gate_finals", "has_gate_mlp"), "mtlkernels._convert.easyrec"),
    ("CGC_Layer", ("specific_experts", "shared_experts", "gate", "num_tasks"), "mtlkernels._convert.fuxictr"),
    ("MMoE_Layer", ("experts", "gate", "num_experts", "gate_activation"), "mtlkernels._convert.fuxictr"),
    ("MMoE", ("experts_shared", "gate_specific", "task_name", "_prepare_rep"), "mtlkernels._convert.libmtl"),
    ("CGC", ("experts_shared", "experts_specific", "gate_specific", "_prepare_rep"), "mtlkernels._convert.libmtl"),
    (
        "PLEModel",
        ("task_experts", "share_experts", "task_gates", "share_gates"),
        "mtlkernels._convert.mtreclib",
    ),
    ("MMoEModel", ("expert", "gate", "tower", "numerical_layer"), "mtlkernels._convert.mtreclib"),
)
_registered: dict[type, Trunk] = {}


class FusedRegistered(FusedTrunk):
    """A trunk of a class that the user has registered."""

    @property
    def _mtlkernels_trunk(self: Any) -> Trunk | None:  # type: ignore[override]
        """None in a process that unpickled the module and has not registered its class."""
        return next((_registered[base] for base in self._mtlkernels_original.__mro__ if base in _registered), None)


def register_trunk(kind: type, trunk: Trunk) -> None:
    """Makes a class known by its description."""
    _registered[kind] = trunk


def find_converter(module: nn.Module) -> Converter | None:
    """The converter for a module's class or the nearest of its bases."""
    for base in type(module).__mro__:
        if base in _registered:
            trunk = _registered[base]
            return Converter(functools.partial(plan_trunk, trunk, base), FusedRegistered, trunk.method)
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _MODULES:
            converter: Converter = importlib.import_module(_MODULES[name]).CONVERTERS[name]
            return converter
        for known, attributes, source in _STRUCTURES:
            if base.__name__ == known and all(hasattr(module, attribute) for attribute in attributes):
                mixin = importlib.import_module(source).MIXINS[known]
                return Converter(mixin._mtlkernels_planner(base), mixin)
    return None


def known_names() -> list[str]:
    """The classes that can be converted."""
    registered = (f"{kind.__module__}.{kind.__qualname__}" for kind in _registered)
    return [*sorted([*_MODULES, *registered]), *sorted({name for name, _, _ in _STRUCTURES})]
