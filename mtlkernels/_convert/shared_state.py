"""What a module's code may write to that is not the module's own: attributes of classes, and global variables."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (list, dict, set, collections.deque)


class SharedState:
    """The class attributes and global containers that the code of a module's classes names, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes: list[tuple[type, str, Any]] = []
        self._containers: list[tuple[str, Any, Any]] = []
        seen: set[int] = set()
        for kind in _classes(module):
            for name, value in list(vars(kind).items()):
                if isinstance(value, (int, float, str, Tensor, type(None), *_CONTAINERS)) and name[:2] != "__":
                    self._attributes.append((kind, name, value))
                    self._keep(f"{kind.__name__}.{name}", value, seen)
                elif isinstance(value, types.FunctionType):
                    for where, container in _named(value):
                        self._keep(where, container, seen)

    def _keep(self, name: str, value: Any, seen: set[int]) -> None:
        if isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            self._containers.append((name, value, value.copy()))

    def change(self) -> str | None:
        """The name of something that is no longer as it was."""
        for kind, name, value in self._attributes:
            if vars(kind).get(name) is not value:
                return f"{kind.__name__}.{name}"
        for name, value, before in self._containers:
            if len(value) != len(before) or not all(map(_is, _parts(value), _parts(before))):
                return name
        return None

    def restore(self) -> None:
        """Makes it as it was, where it has changed."""
        for kind, name, value in self._attributes:
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)
        for _, value, before in self._containers:
            if len(value) != len(before) or not all(map(_is, _parts(value), _parts(before))):
                value.clear()
                (value.extend if isinstance(value, (list, collections.deque)) else value.update)(before)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _parts(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [part for pair in container.items() for part in pair]
    return sorted(container, key=id) if isinstance(container, set) else list(container)


def _classes(module: nn.Module) -> Iterator[type]:
    """The classes of a module and its parts but PyTorch's own."""
    kinds = dict.fromkeys(kind for part in module.modules() for kind in type(part).__mro__ if kind is not object)
    return (kind for kind in kinds if kind.__module__.partition(".")[0] != "torch")


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The global variables and those of enclosing functions that a function's code names."""
    codes, names = [function.__code__], set()
    for code in codes:
        names |= {*code.co_names}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    yield from ((name, function.__globals__[name]) for name in sorted(names) if name in function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
