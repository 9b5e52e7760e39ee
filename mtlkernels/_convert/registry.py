"""Which classes can be converted: those of libraries, found without importing one, and those that users register."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mtlkernels._convert.activations import full_name
from mtlkernels._convert.classes import Fused, description_of
from mtlkernels._convert.description import Softmaxes, TrunkDescription
from mtlkernels._convert.levels import lengths
from mtlkernels._convert.planning import Plan, left_alone, plan_trunk

# Libraries on PyPI by their package: the name there, the versions that were read, the file here with ``DESCRIPTIONS``,
# which may import the library, as it is there already, and the classes.
_LIBRARIES = {
    "deepctr_torch": (
        "deepctr-torch",
        ("0.3.0",),
        "deepctr",
        ("models.multitask.ple.PLE", "models.multitask.mmoe.MMOE"),
    ),
    "nextrec": ("nextrec", ("0.6.14",), "nextrec", ("models.multitask.mmoe.MMOE", "models.multitask.ple.CGCLayer")),
    "torch_rechub": (
        "torch-rechub",
        ("0.9.0",),
        "rechub",
        ("models.multi_task.ple.CGC", "models.multi_task.mmoe.MMOE"),
    ),
}
# Of libraries that are copied rather than installed, whose modules may be anywhere: class, what an instance has, file.
_STRUCTURES = (
    ("ExtractionNet", ("_task_layers", "_shared_layers", "_task_gates", "_shared_gate"), "easyrec"),
    ("MMoE", ("expert_mlps", "gate_finals", "has_gate_mlp"), "easyrec"),
    ("CGC_Layer", ("specific_experts", "shared_experts", "gate", "num_tasks"), "fuxictr"),
    ("MMoE_Layer", ("experts", "gate", "num_experts", "gate_activation"), "fuxictr"),
    ("MMoE", ("experts_shared", "gate_specific", "task_name", "_prepare_rep"), "libmtl"),
    ("CGC", ("experts_shared", "experts_specific", "gate_specific", "_prepare_rep"), "libmtl"),
    ("PLEModel", ("task_experts", "share_experts", "task_gates", "share_gates"), "mtreclib"),
    ("MMoEModel", ("expert", "gate", "tower", "numerical_layer"), "mtreclib"),
)
_registered: dict[type, TrunkDescription] = {}


@dataclass(frozen=True)
class Converter:
    """How one class is converted.

    Args:
        plan: from an instance and its path in the model, its plan.
        base, method, source: as :func:`mtlkernels._convert.classes.converted_class` takes them.
        read: from an instance, the modules that each call reads.
        writes: attributes that each call writes.
        softmaxes: from an instance, for each level which gates have a softmax of their own.
        lengths: from an instance, those of its lists, of which a user's routing may be made; None where routings are
            made of attributes, which are watched.
    """

    plan: Callable[[nn.Module, str], Plan]
    base: type[Fused] = Fused
    method: str = "forward"
    source: str = ""
    read: Callable[[nn.Module], Iterable[Any]] = lambda module: ()
    writes: Sequence[str] = ()
    softmaxes: Callable[[nn.Module], Softmaxes] = lambda module: ()
    lengths: Callable[[nn.Module], tuple[int, ...] | None] = lambda module: None


class FusedRegistered(Fused):
    """A trunk of a class that the user has registered."""

    @property
    def _mtlkernels_trunk(self: Any) -> TrunkDescription | None:
        """None in a process that unpickled the module and has not registered its class."""
        return next((_registered[base] for base in self._mtlkernels_original.__mro__ if base in _registered), None)


def register_trunk(kind: type, trunk: TrunkDescription) -> None:
    """Makes a class known by its description."""
    _registered[kind] = trunk


def find_converter(module: nn.Module) -> Converter | None:
    """The converter for a module's class or the nearest of its bases."""
    for base in type(module).__mro__:
        if base in _registered:
            trunk = _registered[base]
            plan = functools.partial(plan_trunk, trunk, base)
            of_instance: Any = {"read": trunk.read, "softmaxes": trunk.softmaxes, "lengths": lengths}
            return Converter(plan, FusedRegistered, trunk.method, **of_instance)
        package, _, name = full_name(base).partition(".")
        if package in _LIBRARIES and name in _LIBRARIES[package][-1]:
            library, versions, file, _ = _LIBRARIES[package]
            version = getattr(sys.modules[package], "__version__", "of an unknown version")
            if version in versions:
                return _converter(file, base)
            reason = f"{library} {version} is not known, {', '.join(versions)} is"
            return Converter(functools.partial(left_alone, reason))
        for known, attributes, file in _STRUCTURES:
            if base.__name__ == known and all(hasattr(module, attribute) for attribute in attributes):
                return _converter(file, base)
    return None


def _converter(file: str, base: type) -> Converter:
    source = f"{file}.{base.__name__}"
    description = description_of(source)
    plan = description.plan or functools.partial(plan_trunk, description, base)
    of_instance = description.read, description.writes, description.softmaxes
    return Converter(plan, Fused, description.method, source, *of_instance)


def known_names() -> list[str]:
    """The classes that can be converted."""
    of_libraries = [f"{package}.{name}" for package, (*_, names) in _LIBRARIES.items() for name in names]
    return [*sorted([*of_libraries, *map(full_name, _registered)]), *sorted({name for name, _, _ in _STRUCTURES})]
