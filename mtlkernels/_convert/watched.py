"""What the code of a converted module reads beside tensors and parts, so that another value brings its own code back.

A trial shows what a forward pass does with what a module has now. A temperature, a flag, a mask that is None so far or
a function that is put in another's place may become another one later, as schedules have it.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.classes import is_torchs, original_class

# Of a module or an object, or of a dictionary: what it has under a name.
Entry = tuple[Any, Any, Any]
_NUMBERS = (bool, int, float)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Entries of a container or an object that are looked at, and how deep they may lie.
_MOST, _DEEPEST = 32, 3
_INTERNAL = frozenset(vars(nn.Module()))


class Shadowed:
    """In the place of a value: the class's is a method, in the place of which the instance has nothing of its own."""


def watched(module: nn.Module, method: str, read: Iterable[Any]) -> tuple[Entry, ...]:
    """What ``method`` of a module, and the forward methods of its parts, name that no call reads anew.

    ``read`` are the modules that each call reads.
    """
    known = set(map(id, read))
    return tuple(
        entry
        for part in module.modules()
        if not is_torchs(original_class(type(part)) or type(part))
        for entry in _of_part(part, method if part is module else "forward", known)
    )


def changed(entries: Sequence[Entry]) -> str | None:
    """The name of something that is no longer what it was."""
    for owner, name, value in entries:
        if value is Shadowed:
            if name in owner.__dict__:
                return str(name)
            continue
        now = owner.get(name, Shadowed) if isinstance(owner, dict) else getattr(owner, name, Shadowed)
        if now is not value and not _is_equal(now, value):
            return str(name)
    return None


def _is_equal(now: Any, value: Any) -> bool:
    if type(value) is tuple and type(now) in (list, tuple):
        return len(now) == len(value) and all(a is b or _is_equal(a, b) for a, b in zip(now, value, strict=True))
    return type(now) is type(value) and type(value) in _SCALARS and bool(now == value)


def _of_part(part: nn.Module, method: str, known: set[int]) -> Iterator[Entry]:
    kinds = [kind for kind in type(part).__mro__ if not is_torchs(kind) and kind is not object]
    own = vars(part)
    for name in sorted(_names(kinds, method) - _INTERNAL):
        if name in own:
            yield from _of_value(part, name, own[name], 0)
        elif name in part._modules:
            inner: Any = part._modules[name]
            if inner is not None and id(inner) not in known and not (inner._modules or inner._parameters):
                yield part._modules, name, inner
        elif name not in part._parameters and name not in part._buffers:
            value = next((vars(kind)[name] for kind in kinds if name in vars(kind)), Shadowed)
            if type(value) in _SCALARS:
                yield part, name, value
            elif isinstance(value, types.FunctionType):
                yield part, name, Shadowed


def _of_value(owner: Any, name: Any, value: Any, depth: int) -> Iterator[Entry]:
    """An entry and, of containers and objects of the user's, those in it."""
    if type(value) in (list, tuple) and 0 < len(value) <= _MOST and all(type(part) in _NUMBERS for part in value):
        yield owner, name, tuple(value)
        return
    yield owner, name, value
    if depth == _DEEPEST or isinstance(value, (Tensor, nn.Module, type, types.FunctionType, types.MethodType)):
        return
    inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    if len(inner) <= _MOST:
        for key, part in inner.items():
            yield from _of_value(value, key, part, depth + 1)


def _names(kinds: Sequence[type], method: str) -> set[str]:
    """The names in the code of a method, and of the methods and properties of these classes that it names in turn."""
    found: set[str] = set()
    waiting = [method]
    while waiting:
        name = waiting.pop()
        for kind in kinds:
            value = vars(kind).get(name)
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            new = set(_names_of(value.__code__)) - found if isinstance(value, types.FunctionType) else set()
            found |= new
            waiting += new
    return found


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
