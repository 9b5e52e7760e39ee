"""What code finds by its names in objects, classes, functions and modules, and which of their methods it may call."""

from __future__ import annotations

import enum
import types
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.classes import is_torchs
from mtlkernels._convert.copies import slots_of
from mtlkernels._convert.reading import is_own
from mtlkernels._convert.shared_state import is_object, is_users
from mtlkernels._convert.values import is_data

INTERNAL = frozenset(vars(nn.Module()))


def inside(value: Any) -> Mapping[Any, Any] | None:
    """What is read by its names of a dictionary, an object, a function, a class or a module; None of others."""
    if isinstance(value, dict):
        return value
    if isinstance(value, types.ModuleType):
        return vars(value) if is_own(value) else None
    if isinstance(value, type):
        return _attributes(value) if is_owner(value) else None
    if isinstance(value, types.FunctionType):
        return vars(value)
    names = [name for kind in type(value).__mro__ if is_users(kind) for name in slots_of(kind)]
    if not (names or is_object(value)) or isinstance(value, (nn.Module, Tensor, enum.Enum)):
        return None
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**_attributes(type(value)), **slots, **getattr(value, "__dict__", {})}


def is_owner(value: Any) -> bool:
    """Whether it is an object or a class whose attributes may be watched, and no descriptor."""
    if isinstance(value, type):
        return is_own(value) and not issubclass(value, enum.Enum)
    return inside(value) is not None and not hasattr(type(value), "__get__")


def settings_of(module: nn.Module, words: Collection[Any]) -> dict[str, Any]:
    """What the forward method of a module reads of it beside its parameters, and its parts.

    Of PyTorch's own methods all that it has, of the user's what the code there names.
    """
    whole = has_torchs_forward(type(module))
    own = {name: value for name, value in vars(module).items() if name not in INTERNAL and (whole or name in words)}
    return own | ({"_modules": module._modules} if module._modules else {})


def has_torchs_forward(kind: type) -> bool:
    """Whether a module's class has a forward method of PyTorch's, perhaps behind one of the user's."""
    return any(is_torchs(base) and "forward" in vars(base) for base in kind.__mro__ if base is not nn.Module)


def _attributes(kind: type) -> dict[str, Any]:
    """The data that a class has, and those of its bases that are neither PyTorch's nor Python's."""
    bases = [base for base in reversed(kind.__mro__) if is_users(base)]
    found = {name: value for base in bases for name, value in vars(base).items() if name[:2] != "__"}
    return {name: value for name, value in found.items() if is_data(value)}


def is_method(kind: type, name: Any) -> bool:
    """Whether a class has something else of that name than data, and than the place of some of its instances'."""
    if not (isinstance(name, str) and hasattr(kind, name)):
        return False
    return not isinstance(getattr(kind, name), types.MemberDescriptorType)
