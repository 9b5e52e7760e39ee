"""What the code of a converted module reads beside tensors and parts, so that another value brings its own code back.

A trial shows what a forward pass does with what a module has now. A temperature, a flag, a mask that is None so far or
a function that is put in another's place may become another one later, as schedules have it.

What is kept is data that copies and pickles of the module can have: numbers and words, and of all else its kind alone.
"""

from __future__ import annotations

import dis
import enum
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mtlkernels import _torch
from mtlkernels._convert.classes import is_torchs, original_class
from mtlkernels._convert.shared_state import is_object

# By which names something is found from a part on, and what it was.
Entry = tuple[tuple[Any, ...], Any]
# By which names a part is found, and its entries.
Watched = tuple[tuple[tuple[str, ...], tuple[Entry, ...]], ...]
_NUMBERS = (bool, int, float)
_SCALARS = (*_NUMBERS, complex, str, bytes, type(None), torch.dtype, torch.Size, enum.Enum)
# Numbers in a list, and entries of a container by names that the code does not have, that are looked at.
_MOST = 32
_INTERNAL = frozenset(vars(nn.Module()))
_PARTS = "_modules"


class Absent:
    """In the place of a value: there is nothing of the name."""


# In the place of a value that is no number or word: one of two words, and its class, or a function's name and line.
Kind = tuple[str, str]
_OBJECT, _FUNCTION = "object", "function"


def changed(module: Any, watched: Watched) -> str | None:
    """The name of something that is no longer what it was."""
    try:
        for path, entries in watched:
            part = module
            for name in path:
                part = part._modules[name]
            for names, value in entries:
                now = _found(part, names)
                if now is not value and not _is_same(now, value):
                    return ".".join(map(str, names))
    except Exception:  # of code that is not ours, or of parts that are gone
        return "something"
    return None


def _found(part: Any, names: Sequence[Any]) -> Any:
    """What an instance, or its class, has under a name, and that under the next one."""
    now: Any = part.__dict__.get(names[0], Absent)
    if now is Absent and len(names) == 1:
        now = getattr(type(part), names[0], Absent)
        return now if isinstance(now, _SCALARS) else Absent
    for name in names[1:]:
        now = dict.get(now, name, Absent) if isinstance(now, dict) else getattr(now, name, Absent)
    return now


def _is_same(now: Any, value: Any) -> bool:
    if type(value) is tuple and type(value[0]) is str:
        traced = _torch.compiling() and value[0] == _OBJECT  # of which the compiler cannot tell all classes
        return traced or _kind_of(now) == value
    if type(value) is tuple:
        return type(now) in (list, tuple) and len(now) == len(value) and all(map(_is_same, now, value))
    return type(now) is type(value) and bool(now == value or (now != now and value != value))


def _kind_of(value: Any) -> Kind:
    value = getattr(value, "__func__", value)
    if isinstance(value, types.FunctionType):
        return _FUNCTION, f"{value.__module__}.{value.__qualname__} {value.__code__.co_firstlineno}"
    if isinstance(value, (types.BuiltinFunctionType, type)):
        return _FUNCTION, f"{value.__module__}.{value.__qualname__}"
    kind: Any = type(value)
    return _kind_of_type(kind)


@functools.lru_cache(256)
def _kind_of_type(kind: type) -> Kind:
    return _OBJECT, f"{kind.__module__}.{kind.__qualname__}"


def _value_of(value: Any) -> Any:
    """What is kept of a value."""
    if isinstance(value, _SCALARS):
        return value
    if type(value) in (list, tuple) and 0 < len(value) <= _MOST and all(type(part) in _NUMBERS for part in value):
        return tuple(value)
    return _kind_of(value)


def watched(module: nn.Module, method: str, read: Iterable[Any]) -> Watched:
    """What ``method`` of a module, and the forward methods of the parts that it names, read that no call reads anew.

    ``read`` are the modules that each call reads.
    """
    known = set(map(id, read))
    found: list[tuple[tuple[str, ...], tuple[Entry, ...]]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), module)]
    seen: set[int] = set()
    while waiting:
        path, part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        kind = original_class(type(part)) or type(part)
        names = None  # all of its parts
        if not is_torchs(kind):
            code = _Code(kind, method if part is module else "forward")
            entries = tuple(dict(_of_part(part, code, known)).items())
            if entries:
                found.append((path, entries))
            names = code.names
        waiting += [((*path, n), inner) for n, inner in part._modules.items() if names is None or n in names]
    return tuple(found)


def _of_part(part: Any, code: _Code, known: set[int]) -> Iterator[Entry]:
    own = vars(part)
    for name in sorted(code.names - _INTERNAL):
        if name in own:
            yield from _of_value((name,), own[name], code)
        elif name in part._modules:
            inner: Any = part._modules[name]
            if inner is not None and id(inner) not in known and not (inner._modules or inner._parameters):
                yield (_PARTS, name), _kind_of(inner)
        elif name not in part._parameters and name not in part._buffers:
            value = getattr(type(part), name, Absent)
            if isinstance(value, _SCALARS):
                yield (name,), value
            elif name != code.method:
                yield (name,), Absent  # nothing of the instance's own, in the place of its class's method, or at all


def _of_value(names: tuple[Any, ...], value: Any, code: _Code) -> Iterator[Entry]:
    """An entry and, of containers and objects of the user's, what the code reads of them."""
    if isinstance(value, torch.device):  # which says where tensors are made, and changes no number
        return
    found = list(_of_inner(names, value, code))
    if not found:
        yield names, _value_of(value)
    yield from found


def _of_inner(names: tuple[Any, ...], value: Any, code: _Code) -> Iterator[Entry]:
    inner: Mapping[Any, Any] = value if isinstance(value, dict) else vars(value) if is_object(value) else {}
    further = {path[len(names)] for path in code.paths if path[: len(names)] == names and len(path) > len(names)}
    for key in sorted(further & inner.keys(), key=str):
        yield from _of_value((*names, key), inner[key], code)
    if names in code.paths:  # it goes elsewhere as a whole
        keys = [key for key in inner if key in code.words] or (list(inner) if isinstance(value, dict) else [])
        for key in keys[:_MOST] if len(keys) <= _MOST else ():
            if key not in further and isinstance(inner[key], _SCALARS):
                yield (*names, key), inner[key]


@dataclass
class _Code:
    """What a method of a class, and the methods and properties that it calls in turn, read of ``self``.

    Attributes:
        names: the attributes of ``self``.
        paths: what is read, as ``("config", "temperature")`` for ``self.config.temperature``; as far as is known.
        words: all names and strings in the code, by which what is read may be found.
    """

    kind: type
    method: str
    names: set[str] = field(default_factory=set)
    paths: set[tuple[Any, ...]] = field(default_factory=set)
    words: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        kinds = [kind for kind in self.kind.__mro__ if not is_torchs(kind) and kind is not object]
        waiting, seen = [(self.method, 0)], set()
        while waiting:
            name, start = waiting.pop()
            at = next((i for i in range(start, len(kinds)) if name in vars(kinds[i])), None)
            if at is None or (name, at) in seen:
                continue
            seen.add((name, at))
            for function in _functions(vars(kinds[at])[name]):
                found, words = self._read(function)
                waiting += [(other, 0) for other in found]
                if "super" in words:
                    waiting += [(other, at + 1) for other in words if isinstance(other, str)]

    def _read(self, function: types.FunctionType) -> tuple[set[str], set[Any]]:
        """The attributes of ``self`` in a function's code, and all of its words."""
        paths: set[tuple[Any, ...]] = set()
        words: set[Any] = set()
        this = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
        escapes = not this
        for code in _codes(function.__code__):
            words |= {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
            if this:
                found, leaves = _paths(code, this[0])
                paths |= found
                escapes = escapes or leaves
        if escapes:  # to functions of the user's, perhaps
            named = (function.__globals__.get(word) for word in words if isinstance(word, str))
            inner = [code for f in named if isinstance(f, types.FunctionType) for code in _codes(f.__code__)]
            words |= {word for code in inner for word in code.co_names}
        names = {path[0] for path in paths} | ({word for word in words if word.isidentifier()} if escapes else set())
        self.names |= names
        self.paths |= paths | ({(name,) for name in names} if escapes else set())
        self.words |= words
        return names, words


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Those behind an attribute of a class, with what they wrap."""
    for part in (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),):
        while isinstance(part, types.FunctionType):
            yield part
            part = getattr(part, "__wrapped__", None)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _paths(code: types.CodeType, this: str) -> tuple[set[tuple[Any, ...]], bool]:
    """The paths of names that follow ``this`` in a code, and whether ``this`` goes elsewhere by itself.

    Instructions have other names in each version of Python; where one is not known, ``this`` goes elsewhere.
    """
    paths: set[tuple[Any, ...]] = set()
    escapes = False
    path: tuple[Any, ...] | None = None
    constant: Any = Absent
    for step in dis.get_instructions(code):
        name = step.opname
        if path is not None and name in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, step.argval)
        elif path and name in ("LOAD_CONST", "LOAD_SMALL_INT") and isinstance(step.argval, (str, int)):
            constant = step.argval
            continue
        elif path and constant is not Absent and (name == "BINARY_SUBSCR" or step.argrepr == "[]"):
            path = (*path, constant)
        elif name in ("CACHE", "RESUME", "EXTENDED_ARG"):
            continue
        else:
            if path:
                paths.add(path)
            escapes = escapes or (path == () and name != "STORE_ATTR")
            path = None
            loaded = step.argval[-1:] if isinstance(step.argval, tuple) else (step.argval,)
            if ("LOAD_FAST" in name or name == "LOAD_DEREF") and loaded == (this,):
                path = ()
            escapes = escapes or (isinstance(step.argval, tuple) and this in step.argval[:-1])
        constant = Absent
    return paths | ({path} if path else set()), escapes or path == ()
