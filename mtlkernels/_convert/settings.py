"""The numbers that modules keep as attributes, which may become others after a conversion."""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.classes import is_torchs

_FACTOR = re.compile("temp|tau|scale|factor|alpha|beta|gamma|weight|sharp", re.IGNORECASE)

_FEW = 64  # numbers in a tensor


@dataclass(frozen=True)
class Setting:
    """A number, how to exchange it, and how to have it as it was."""

    name: str
    value: Any
    put: Callable[[Any], None]
    restore: Callable[[], None]

    @property
    def another(self) -> Any:
        """Another number, or other ones."""
        return 0.5 if isinstance(self.value, float) and math.isinf(self.value) else 1.25 * self.value + 0.125


def settings(module: nn.Module) -> Iterator[Setting]:
    """Those of a module and its parts but PyTorch's own.

    Floats and small tensors of an instance, floats of its classes and in dicts and namespaces that it keeps; and whole
    numbers of an instance that are factors by their names. Most others are sizes, of which another is another model.
    """
    for part in module.modules():
        if is_torchs(type(part)):
            continue
        for name, value in list(vars(part).items()):
            number = type(value) is float or (type(value) is int and _FACTOR.search(name))
            if number or (type(value) is Tensor and value.is_floating_point() and value.numel() <= _FEW):
                yield _of_instance(part, name, value)
            elif name[:1] != "_" and type(value) is dict:
                yield from _of_dict(name, value)
            elif isinstance(value, types.SimpleNamespace):
                yield from _of_dict(name, vars(value))
        for kind in type(part).__mro__:
            if is_torchs(kind) or kind is object:
                continue
            for name, value in list(vars(kind).items()):
                if type(value) is float and name not in vars(part):
                    yield Setting(name, value, functools.partial(setattr, part, name), _deleting(part, name))


def _of_instance(part: nn.Module, name: str, value: Any) -> Setting:
    return Setting(name, value, functools.partial(setattr, part, name), functools.partial(setattr, part, name, value))


def _of_dict(owner: str, values: dict[Any, Any]) -> Iterator[Setting]:
    for key, value in list(values.items()):
        if type(value) is float:
            put = functools.partial(values.__setitem__, key)
            yield Setting(f"{owner}.{key}", value, put, functools.partial(put, value))


def _deleting(part: nn.Module, name: str) -> Callable[[], None]:
    return functools.partial(vars(part).pop, name, None)
