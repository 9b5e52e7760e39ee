"""Makes entries of what code reads by names: by which names each value is found, and what is kept of it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from mtlkernels._convert.arguments import Absent
from mtlkernels._convert.keeping import Keeper
from mtlkernels._convert.objects import inside, is_method
from mtlkernels._convert.reading import Code, Path, Surroundings, is_own, methods_of
from mtlkernels._convert.values import TooMuch, is_data, kind_of, names_of

# By which names something is found from a part or a scope on, and what is kept of it.
Entry = tuple[tuple[Any, ...], Any]
# Objects within objects that code reads one after another.
_MOST_DEEP = 8
# Methods of containers that code calls without a look at what is there.
_WRITING = frozenset(("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "update"))


class Reader:
    """What code reads of the values that it finds by names.

    Args:
        paths: what it reads, as far as is known.
        words: by which it may read more of what goes elsewhere as a whole.
        around: takes what functions among the values, and methods of objects, read beside them.
        is_known: see :class:`Keeper`.
    """

    def __init__(
        self, paths: set[Path], words: set[Any], around: Surroundings, is_known: Callable[[Any], bool]
    ) -> None:
        self.paths, self.words, self._around, self.is_known = set(paths), set(words), around, is_known
        self._codes: dict[tuple[type, frozenset[str]], Code] = {}

    def settled(self, entries: Callable[..., Iterable[Entry]], *args: Any) -> tuple[Entry, ...]:
        """``entries`` of this reader, once all code among the values is read, as it may read what came before it."""
        while True:
            before = len(self.paths), len(self.words)
            found = tuple(dict(entries(self, *args)).items())
            if before == (len(self.paths), len(self.words)):
                return found

    def read(self, names: tuple[Any, ...], value: Any) -> Iterator[Entry]:
        """An entry for a value, or several for what is read of it."""
        if isinstance(value, torch.device):  # which says where tensors are made, and changes no number
            return
        within = None if isinstance(value, types.FunctionType) else inside(value)
        further = self._further(names)
        by_method = isinstance(value, dict) and any(key not in value and is_method(dict, key) for key in further)
        if isinstance(value, dict) and further and names not in self.paths and not by_method:
            for key in sorted(further, key=str):
                yield from self.read((*names, key), value[key]) if key in value else [((*names, key), Absent)]
            return
        if within is None or isinstance(value, dict):
            written = bool(further) and further <= _WRITING and names not in self.paths
            yield names, kind_of(value) if written else self.kept(names, value)
            return
        if len(names) > _MOST_DEEP:
            raise TooMuch(f"its code reads {names_of(names)}, objects within objects")
        yield from self._of_object(names, value, within)

    def _of_object(self, names: tuple[Any, ...], value: Any, within: Mapping[Any, Any]) -> Iterator[Entry]:
        kind = value if isinstance(value, type) else type(value)
        called = self._methods(names, kind, within)
        if called:
            code = self._code(kind, called)
            own = within if isinstance(value, type) else code.names  # its instances are elsewhere
            self.paths |= {(*names, *path) for path in code.paths if path[0] in own}
            self.words |= code.words
        found = False
        for key in sorted(self._further(names), key=str):
            if key in within:
                found = True
                yield from self.read((*names, key), within[key])
            elif not is_method(kind, key) and isinstance(key, str) and not isinstance(value, types.ModuleType):
                found = True
                now = getattr(value, key, Absent)
                yield (*names, key), now if now is Absent else self.kept((*names, key), now)
        if names in self.paths:  # it goes elsewhere as a whole
            for key in sorted((within.keys() & self.words) - self._further(names)):
                found = True
                yield (*names, key), self.kept((*names, key), within[key])
        if is_data(value):  # a list or a number of a class of the user's
            yield names, self.kept(names, value)
            yield (*names, "__class__"), kind_of(kind)
        elif called or not found:
            yield names, kind_of(value)

    def _methods(self, names: tuple[Any, ...], kind: type, within: Mapping[Any, Any]) -> set[str]:
        """The methods of the user's by which code reads an object."""
        if not is_own(kind, self._around.packages):
            return set()
        named = {key for key in self._further(names) if isinstance(key, str)} - within.keys()
        whole = names in self.paths
        own = methods_of(kind, {*named, *self.words, "forward"} if whole else named)
        return own if whole else own & named

    def kept(self, names: tuple[Any, ...], value: Any) -> Any:
        """What is kept of a value."""
        try:
            return Keeper(self._words_of, self.is_known).keep(value)
        except TooMuch as error:
            raise TooMuch(f"its code reads {names_of(names)}, which may become another, and is {error}") from None

    def _words_of(self, value: Any) -> set[Any]:
        """By which attributes of a value may be read, with those of its own code."""
        kind = value if isinstance(value, type) else type(value)
        if isinstance(value, types.FunctionType):
            self._around.learn(value, cells=False)
            self.words |= self._around.words
        elif is_own(kind, self._around.packages):
            self.words |= self._code(kind, methods_of(kind, {*self.words, "forward"})).words
        return self.words

    def _code(self, kind: type, methods: set[str]) -> Code:
        key = kind, frozenset(methods)
        if key not in self._codes:
            self._codes[key] = Code(kind, methods, self._around.scopes)
        return self._codes[key]

    def _further(self, names: tuple[Any, ...]) -> set[Any]:
        """What is read next behind some names."""
        return {path[len(names)] for path in self.paths if path[: len(names)] == names and len(path) > len(names)}
