"""What is kept of a value that code reads, made of that value; ``values.py`` says what it is, and compares it."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels._convert.objects import inside, settings_of
from mtlkernels._convert.shared_state import MOST_NUMBERS
from mtlkernels._convert.values import (
    SCALARS,
    Instructions,
    Numbers,
    TooMuch,
    What,
    beside,
    is_array,
    is_described,
    is_getter,
    is_odd,
    kind_of,
)

# Entries of containers, within one another, that a call may compare.
MOST_ENTRIES, MOST_DEEP = 10000, 16


class Keeper:
    """Makes of values what is kept of them.

    Args:
        words_of: names of attributes, of which an object in a container, or one that a function has beside it, may have
            some that are read.
        is_known: whether a tensor or a module is read by each call anyway, or a tensor is a parameter or a buffer.
    """

    def __init__(self, words_of: Callable[[Any], Collection[Any]], is_known: Callable[[Any], bool]) -> None:
        self._words_of, self._is_known = words_of, is_known
        self._left = MOST_ENTRIES
        self._open: set[int] = set()

    def keep(self, value: Any, depth: int = 0) -> Any:
        """What is kept of a value, and of what is in it."""
        if isinstance(value, SCALARS):
            return value
        if isinstance(value, Tensor):
            return kind_of(value) if is_odd(value) or self._is_known(value) else Numbers(value)
        if is_array(value):
            return self._keep_array(value, depth)
        if depth > MOST_DEEP:
            raise TooMuch("containers within containers")
        if isinstance(value, tuple):
            parts = self._keep_all(value, depth)
            return parts if all(isinstance(part, SCALARS) for part in parts) else (What.ITEMS, parts)
        if isinstance(value, (list, collections.deque)):
            return What.ITEMS, self._keep_all(value, depth)
        if isinstance(value, dict):
            return What.ENTRIES, self._keep_all(value, depth), self._keep_all(value.values(), depth)
        if isinstance(value, (set, frozenset)):
            parts = self._keep_all(value, depth)
            return What.MEMBERS, frozenset(part for part in parts if not is_described(part)), len(parts)
        if id(value) in self._open:  # as a function that calls itself
            return _alone(value)
        self._open.add(id(value))
        try:
            return self._keep_object(value, depth)
        finally:
            self._open.remove(id(value))

    def _keep_object(self, value: Any, depth: int) -> Any:
        """A function, a method, or an object that is no container, with those of its attributes that are read."""
        if isinstance(value, functools.partial):
            return What.ITEMS, self._keep_all((value.func, value.args, value.keywords), depth)
        if isinstance(value, types.MethodType):
            return What.METHOD, self._keep_all((value.__func__, value.__self__), depth)
        if is_getter(value):
            return What.GETTER, self.keep(value.__reduce__(), depth + 1)
        if isinstance(value, torch.jit.ScriptModule):
            raise TooMuch("a scripted module, of which no call can tell another")
        words = self._words_of(value)
        kept = _alone(value)
        if isinstance(value, types.FunctionType):
            kept = (*kept[:2], self.keep(beside(value), depth + 1))
        if isinstance(value, nn.Module):
            own = {} if self._is_known(value) else settings_of(value, words)
        else:
            own = {name: part for name, part in (inside(value) or {}).items() if name in words}
        return (What.WITH, kept, tuple(own), self._keep_all(own.values(), depth)) if own else kept

    def _keep_all(self, values: Collection[Any], depth: int) -> tuple[Any, ...]:
        self._left -= len(values)
        if self._left < 0:
            raise TooMuch(f"more than {MOST_ENTRIES} entries")
        return tuple([self.keep(value, depth + 1) for value in values])

    def _keep_array(self, value: Any, depth: int) -> Any:
        if value.dtype.hasobject:  # whose bytes are addresses
            return What.ITEMS, (tuple(value.shape), self._keep_all(value.ravel().tolist(), depth))
        if value.size > MOST_NUMBERS:
            raise TooMuch(f"more than {MOST_NUMBERS} numbers of NumPy's")
        return What.ARRAY, str(value.dtype), tuple(value.shape), value.tobytes()


def _alone(value: Any) -> Any:
    """What is kept of a value without what is in it."""
    return (
        (What.FUNCTION, Instructions(value.__code__), None) if isinstance(value, types.FunctionType) else kind_of(value)
    )
