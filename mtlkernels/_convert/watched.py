"""What the code of a converted module reads beside tensors and parts, so that another value brings its own code back.

A trial shows what a forward pass does with what a module has now. A temperature, a flag, a mask that is None so far or
a function that is put in another's place may become another one later, as schedules have it.

Each call compares all that is watched, with what is kept of it as ``values.py`` says.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.chains import Product
from mtlkernels._convert.classes import is_torchs, original_class
from mtlkernels._convert.copies import slots_of
from mtlkernels._convert.reading import Code, Path, Scope, Scopes, is_own
from mtlkernels._convert.shared_state import is_object, is_users
from mtlkernels._convert.values import SCALARS, Absent, Keeper, TooMuch, What, is_data, is_same, kind_of, names_of

# By which names something is found from a part or a scope on, and what is kept of it.
Entry = tuple[tuple[Any, ...], Any]
# By which names a part is found, or where variables are, and the entries.
Watched = tuple[tuple[Any, tuple[Entry, ...]], ...]
# Objects within objects that code reads one after another.
_MOST_DEEP = 8
_INTERNAL = frozenset(vars(nn.Module()))
_PARTS = "_modules"
# Methods of containers that code calls without a look at what is there.
_WRITING = frozenset(("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "update"))


def changed(module: Any, watched: Watched) -> str | None:
    """The name of something that is no longer what it was."""
    try:
        for path, entries in watched:
            owner = module
            if type(path) is tuple:
                for name in path:
                    owner = owner._modules[name]
            else:
                owner = path
            for names, value in entries:
                now = _found(owner, names, value is Absent)
                if now is not value and not is_same(now, value):
                    return names_of(names)
    except Exception:  # of code that is not ours, or of parts that are gone
        return "something"
    return None


def _found(owner: Any, names: Sequence[Any], missed: bool) -> Any:
    """What an instance, or its class, or a scope has under a name, and that under the next one.

    Of a name that was ``missed``, a class has methods and the like, which count for nothing.
    """
    now: Any
    if type(owner) is Scope:
        now = owner.get(names[0], _torch.compiling())
    else:
        now = owner.__dict__.get(names[0], Absent)
        if now is Absent:
            now = getattr(type(owner), names[0], Absent)
            if missed and len(names) == 1 and not isinstance(now, SCALARS):
                return Absent
    for name in names[1:]:
        now = dict.get(now, name, Absent) if isinstance(now, dict) else getattr(now, name, Absent)
    return now


def _is_watched(value: Any) -> bool:
    """Whether an attribute of a class, or a variable, is data, or may have some."""
    return is_data(value) or _is_owner(value)


def _is_owner(value: Any) -> bool:
    """Whether it is an object or a class whose attributes may be watched, and no descriptor."""
    if isinstance(value, type):
        return is_own(value) and not issubclass(value, enum.Enum)
    return _inside(value) is not None and not hasattr(type(value), "__get__")


def watched(module: nn.Module, method: str, read: Iterable[Any], writes: Iterable[str] = ()) -> Watched:
    """What ``method`` of a module, and the forward methods of the parts that it names, read that no call reads anew.

    ``read`` are the modules, and the products of tensors, that each call reads, ``writes`` the module's attributes that
    each call writes.

    Raises:
        TooMuch: the code reads more than a call should compare.
    """
    read = list(read)
    known = set(map(id, read))
    is_known = _known_tensors(module, read)
    found: list[tuple[Any, tuple[Entry, ...]]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), module)]
    seen: set[int] = set()
    scopes, words = Scopes(), set[Any]()
    while waiting:
        path, part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        kind = original_class(type(part)) or type(part)
        names = None  # all of its parts
        if not is_torchs(kind):
            code = Code(kind, method if part is module else "forward", scopes)
            reader = _Reader(code.paths, code.words, scopes, is_known)
            own = code.names - _INTERNAL - (set(writes) if part is module else set())
            entries = tuple(dict(_of_part(part, own, code.method, reader, known)).items())
            if entries:
                found.append((path, entries))
            names = code.names
            words |= code.words
        waiting += [((*path, n), inner) for n, inner in part._modules.items() if names is None or n in names]
    for scope, paths in scopes.found.values():
        reader = _Reader(paths, words, Scopes(), is_known)
        entries = tuple(dict(_of_scope(scope, reader)).items())
        if entries:
            found.append((scope, entries))
    return tuple(found)


def _known_tensors(module: nn.Module, read: Iterable[Any]) -> Callable[[Tensor], bool]:
    """Tells the parameters and buffers of a module, and tensors that each call reads, perhaps by other views."""
    products = [step for step in read if isinstance(step, Product)]
    tensors = [*module.parameters(), *module.buffers(), *(t for step in products for t in step.parameters())]
    known = {id(tensor) for tensor in tensors} | {address for t in tensors if (address := _address(t)) is not None}
    return lambda tensor: id(tensor) in known or _address(tensor) in known


def _address(tensor: Tensor) -> tuple[str, int] | None:
    """Where a tensor's memory begins, None where that cannot be told."""
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except Exception:  # of tensors without memory
        return None


def _of_part(part: Any, names: set[str], method: str, reader: _Reader, known: set[int]) -> Iterator[Entry]:
    """Of those names that code reads of a part, one of which may be that of its ``method``."""
    own = vars(part)
    for name in sorted(names):
        if name in own:
            yield from reader.read((name,), own[name])
        elif name in part._modules:
            inner: Any = part._modules[name]
            if inner is not None and id(inner) not in known and not (inner._modules or inner._parameters):
                yield (_PARTS, name), kind_of(inner)
        elif name not in part._parameters and name not in part._buffers:
            value = getattr(type(part), name, Absent)
            if _is_watched(value):
                yield from reader.read((name,), value)
            elif name != method:
                yield (name,), Absent  # nothing of the instance's own, in the place of its class's method, or at all


def _of_scope(scope: Scope, reader: _Reader) -> Iterator[Entry]:
    """Variables that are data, or have some; not the functions, classes and modules themselves that code names."""
    for name in sorted({path[0] for path in reader.paths}):
        try:
            value = scope.get(name)
        except ValueError:  # of an enclosing function, not filled yet
            continue
        if _is_watched(value):
            for names, kept in reader.read((name,), value):
                if not (type(kept) is tuple and kept[:1] in ((What.OBJECT,), (What.FUNCTION,))):
                    yield names, kept


class _Reader:
    """What code reads of the values that it finds by names.

    Args:
        paths: what it reads, as far as is known.
        words: by which it may read more of what goes elsewhere as a whole.
        scopes: takes what methods of objects read beside them.
        is_known: see :class:`Keeper`.
    """

    def __init__(self, paths: set[Path], words: set[Any], scopes: Scopes, is_known: Callable[[Tensor], bool]) -> None:
        self.paths, self._words, self._scopes, self._is_known = set(paths), set(words), scopes, is_known

    def read(self, names: tuple[Any, ...], value: Any) -> Iterator[Entry]:
        """An entry for a value, or several for what is read of it."""
        if isinstance(value, torch.device):  # which says where tensors are made, and changes no number
            return
        inner = _inside(value)
        further = self._further(names)
        by_method = isinstance(value, dict) and any(key not in value and _is_method(dict, key) for key in further)
        if isinstance(value, dict) and further and names not in self.paths and not by_method:
            for key in sorted(further, key=str):
                yield from self.read((*names, key), value[key]) if key in value else [((*names, key), Absent)]
            return
        if inner is None or isinstance(value, dict):
            written = bool(further) and further <= _WRITING and names not in self.paths
            yield names, kind_of(value) if written else self._kept(names, value)
            return
        if len(names) > _MOST_DEEP:
            raise TooMuch(f"its code reads {names_of(names)}, objects within objects")
        yield from self._of_object(names, value, inner)

    def _of_object(self, names: tuple[Any, ...], value: Any, inner: Mapping[Any, Any]) -> Iterator[Entry]:
        kind = type(value)
        if not isinstance(value, (type, types.ModuleType)) and is_own(kind):
            for key in self._further(names) - inner.keys():
                if isinstance(key, str) and _is_method(kind, key):
                    code = Code(kind, key, self._scopes)
                    self.paths |= {(*names, *path) for path in code.paths}
                    self._words |= code.words
        found = False
        for key in sorted(self._further(names), key=str):
            if key in inner:
                found = True
                yield from self.read((*names, key), inner[key])
            elif not _is_method(kind, key) and isinstance(key, str) and not isinstance(value, types.ModuleType):
                found = True
                now = getattr(value, key, Absent)
                yield (*names, key), now if now is Absent else self._kept((*names, key), now)
        if names in self.paths:  # it goes elsewhere as a whole
            for key in sorted((inner.keys() & self._words) - self._further(names)):
                found = True
                yield (*names, key), self._kept((*names, key), inner[key])
        if not found:
            yield names, kind_of(value)

    def _further(self, names: tuple[Any, ...]) -> set[Any]:
        """What is read next behind some names."""
        return {path[len(names)] for path in self.paths if path[: len(names)] == names and len(path) > len(names)}

    def _kept(self, names: tuple[Any, ...], value: Any) -> Any:
        try:
            return Keeper(self._words, self._is_known).keep(value)
        except TooMuch as error:
            raise TooMuch(f"its code reads {names_of(names)}, which may become another, and is {error}") from None


def _inside(value: Any) -> Mapping[Any, Any] | None:
    """What is read by its names of a dictionary, an object, a class or a module; None of others."""
    if isinstance(value, dict):
        return value
    if isinstance(value, types.ModuleType):
        return vars(value) if is_own(value) else None
    if isinstance(value, type):
        return _attributes(value) if _is_owner(value) else None
    names = [name for kind in type(value).__mro__ if is_users(kind) for name in slots_of(kind)]
    if not (names or is_object(value)) or isinstance(value, (nn.Module, Tensor, enum.Enum)):
        return None
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**_attributes(type(value)), **slots, **getattr(value, "__dict__", {})}


def _attributes(kind: type) -> dict[str, Any]:
    """The data that a class has, and those of its bases that are neither PyTorch's nor Python's."""
    bases = [base for base in reversed(kind.__mro__) if is_users(base)]
    found = {name: value for base in bases for name, value in vars(base).items() if name[:2] != "__"}
    return {name: value for name, value in found.items() if is_data(value)}


def _is_method(kind: type, name: Any) -> bool:
    """Whether a class has something else of that name than data."""
    return isinstance(name, str) and hasattr(kind, name)
