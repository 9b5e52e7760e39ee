"""What a module's code may write to that is not the module's own: attributes of classes, and global variables.

Numbers, tensors and arrays are compared by their values, containers by what is in them. What is larger than a trial
should copy, files, and generators of the user's own are not looked at.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, collections.deque)
# Of a container that is looked into, and of a tensor or an array that is copied.
MOST_PARTS, MOST_NUMBERS = 1000, 2**20


class SharedState:
    """The class attributes and global variables that the code of a module's classes names, as they are now.

    Code is that of methods, also of an instance's own, and of the user's functions that it names in turn. What a
    module's hooks name is restored too, but may change: they are called as before a conversion, or keep their module as
    it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes: list[tuple[type, str, Any]] = []
        self._containers: list[tuple[str, Any, Any]] = []
        self._variables: list[tuple[str, dict[str, Any], str, Any]] = []
        self._arrays: list[tuple[str, Any, Any]] = []
        seen: set[int] = set()
        for kind in _classes(module):
            for name, value in list(vars(kind).items()):
                if isinstance(value, (int, float, str, Tensor, type(None), *_CONTAINERS)) and name[:2] != "__":
                    self._attributes.append((kind, name, value))
                code = _function(value)
                if code is not None:
                    self._keep_named(code, seen)
                elif name[:2] != "__":
                    self._keep(f"{kind.__name__}.{name}", value, seen)
        for part in module.modules():
            for code in map(_function, vars(part).values()):
                if code is not None and _is_users(code):
                    self._keep_named(code, seen)
        self._judged = len(self._containers), len(self._variables), len(self._arrays)
        for hook in _hooks(module):
            self._keep_named(hook, seen)

    def _keep_named(self, function: types.FunctionType, seen: set[int]) -> None:
        """The containers that a function names, or one of the functions that it names."""
        if id(function) in seen:
            return
        seen.add(id(function))
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (int, float, str, Tensor)) and _is_users(function):
                self._variables.append((name, function.__globals__, name, value))
        for name, value in _named(function):
            if not isinstance(value, types.FunctionType):
                self._keep(name, value, seen)
            elif _is_users(value):
                self._keep_named(value, seen)

    def _keep(self, name: str, value: Any, seen: set[int]) -> None:
        """A container, or an object of the user's with the containers in it."""
        if id(value) in seen:
            return
        if isinstance(value, _CONTAINERS):
            seen.add(id(value))
            try:
                self._containers.append((name, value, value.copy()))
            except Exception:  # of a class of the user's, which copies otherwise
                return
            if len(value) <= MOST_PARTS:
                for part in value.values() if isinstance(value, dict) else value:
                    if isinstance(part, _CONTAINERS):
                        self._keep(name, part, seen)
        elif type(value) in (Tensor, nn.Parameter):
            plain = value.layout is torch.strided and not (value.is_meta or value.is_quantized)
            if plain and value.numel() <= MOST_NUMBERS:
                seen.add(id(value))
                self._arrays.append((name, value, value.detach().clone()))
        elif type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            if value.size <= MOST_NUMBERS:
                seen.add(id(value))
                self._arrays.append((name, value, value.copy()))
        elif _is_object(value):
            seen.add(id(value))
            self._keep(name, vars(value), seen)
            for inner, part in list(vars(value).items()):
                self._keep(f"{name}.{inner}", part, seen)

    def change(self) -> str | None:
        """The name of something that is no longer as it was."""
        for kind, name, value in self._attributes:
            if vars(kind).get(name) is not value:
                return f"{kind.__name__}.{name}"
        containers, variables, arrays = self._judged
        for name, value, before in self._containers[:containers]:
            if len(value) != len(before) or not all(map(_is, _parts(value), _parts(before))):
                return name
        for name, owner, key, value in self._variables[:variables]:
            if owner.get(key) is not value:
                return name
        return next((name for name, value, before in self._arrays[:arrays] if not _is_equal(value, before)), None)

    def restore(self) -> None:
        """Makes it as it was, where it has changed."""
        for kind, name, value in self._attributes:
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)
        for _, value, before in self._containers:
            if len(value) != len(before) or not all(map(_is, _parts(value), _parts(before))):
                value.clear()
                (value.extend if isinstance(value, (list, collections.deque)) else value.update)(before)
        for _, owner, key, value in self._variables:
            if owner.get(key) is not value:
                owner[key] = value
        for _, value, before in self._arrays:
            if not _is_equal(value, before):
                with torch.no_grad():
                    value[...] = before


def _is(a: Any, b: Any) -> bool:
    return a is b


def _is_equal(value: Any, before: Any) -> bool:
    """Of tensors and arrays, whose shapes do not change."""
    if isinstance(value, Tensor):
        return value.shape == before.shape and torch.equal(value.detach().nan_to_num(), before.nan_to_num())
    return bool(value.tobytes() == before.tobytes())


def _parts(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [part for pair in container.items() for part in pair]
    return sorted(container, key=id) if isinstance(container, set) else list(container)


def _classes(module: nn.Module) -> Iterator[type]:
    """The classes of a module and its parts but PyTorch's own."""
    kinds = dict.fromkeys(kind for part in module.modules() for kind in type(part).__mro__ if kind is not object)
    return filter(_is_users, kinds)


def _is_users(code: type | types.FunctionType | types.ModuleType) -> bool:
    """Whether a class, a function or a module is neither PyTorch's nor Python's own."""
    name = code.__name__ if isinstance(code, types.ModuleType) else code.__module__ or ""
    package = name.partition(".")[0]
    return package not in ("torch", "numpy") and package not in sys.stdlib_module_names


def _is_object(value: Any) -> bool:
    """Whether it is an object of a class of the user's that keeps something, and no module."""
    try:
        return (
            hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor)) and _is_users(type(value))
        )
    except Exception:  # of code that is not ours
        return False


def _function(attribute: Any) -> types.FunctionType | None:
    """The function behind a class's attribute."""
    try:
        if isinstance(attribute, property):
            attribute = attribute.fget
        attribute = getattr(attribute, "__func__", attribute)  # of a static method, or of a class's
    except Exception:  # of a weak reference's proxy, say, whose object is gone
        return None
    return attribute if isinstance(attribute, types.FunctionType) else None


def _hooks(module: nn.Module) -> Iterator[types.FunctionType]:
    """The functions among the hooks of a module and its parts; of hooks that are objects, copies are called."""
    for part in module.modules():
        for kind in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks):
            yield from (hook for hook in kind.values() if isinstance(hook, types.FunctionType))


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The global variables, those of enclosing functions and of modules, and the defaults that a function names."""
    codes, names = [function.__code__], set()
    for code in codes:
        names |= {*code.co_names}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, types.ModuleType) and _is_users(value):
            yield from ((f"{name}.{inner}", vars(value)[inner]) for inner in sorted(names & vars(value).keys()))
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield f"a default of {function.__name__}", value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
