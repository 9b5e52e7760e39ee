"""What is kept of a value that code reads, so that another one is told from it later.

What is kept is data that copies and pickles of a module can have: numbers and words, what is in containers of them, and
of all else its kind alone.
"""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.shared_state import MOST_NUMBERS, is_object

SCALARS = (bool, int, float, complex, str, bytes, range, type(None), torch.dtype, torch.Size, enum.Enum)
# Entries of containers, within one another, that a call may compare.
MOST_ENTRIES, MOST_DEEP = 10000, 16
# Numbers of a tensor on a CPU that each call compares.
FEW_NUMBERS = 1024


class Absent:
    """In the place of a value: there is nothing of the name."""


class What(enum.Enum):
    """What stands behind it in a tuple, in the place of a value that is no number, word or tuple of these."""

    OBJECT = "an object: its class"
    FUNCTION = "a function or a class: its name, and its line"
    WITH = "an object with some of its attributes: its class, their names, and what is kept of them"
    ITEMS = "a list: what is kept of its entries"
    ENTRIES = "a dictionary: the same of its keys and of its values"
    MEMBERS = "a set: those members that are numbers, words or tuples of these, and how many there are"
    ARRAY = "an array or a number of NumPy's: its dtype, shape and bytes"


class TooMuch(ValueError):
    """More than a call should compare."""


class Keeper:
    """Makes of values what is kept of them.

    Args:
        words: names of attributes, of which an object in a container may have some that are read.
        is_known: whether a tensor is read by each call anyway, or a parameter or a buffer.
    """

    def __init__(self, words: Collection[Any], is_known: Any) -> None:
        self._words, self._is_known = words, is_known
        self._left = MOST_ENTRIES

    def keep(self, value: Any, depth: int = 0) -> Any:
        """What is kept of a value, and of what is in it."""
        if isinstance(value, SCALARS):
            return value
        if isinstance(value, Tensor):
            return kind_of(value) if _is_odd(value) or self._is_known(value) else Numbers(value)
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
        if isinstance(value, functools.partial):
            return What.ITEMS, self._keep_all((value.func, value.args, value.keywords), depth)
        names = tuple(name for name in vars(value) if name in self._words) if is_object(value) else ()
        if not names:
            return kind_of(value)
        return What.WITH, kind_of(value), names, self._keep_all([vars(value)[name] for name in names], depth)

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


class Numbers:
    """The numbers of a tensor that is neither a parameter nor a buffer.

    Few are compared at each call. Many, and those on another device, once PyTorch has counted a write to them, or where
    it is another tensor. Copies and pickles have the numbers alone.
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.numel() > MOST_NUMBERS:
            raise TooMuch(f"a tensor of more than {MOST_NUMBERS} numbers, which is not registered as a buffer")
        self._numbers = tensor.detach().to("cpu", copy=True)
        self._seen: tuple[Any, int, bool] | None = None

    def __reduce__(self) -> Any:
        """By its numbers, of which it makes a copy."""
        return Numbers, (self._numbers,)

    def are(self, now: Any) -> bool:
        """Whether a value is a tensor of these numbers."""
        # The compiler cannot look at numbers: code that reads such a tensor is compiled itself.
        if _torch.compiling() or not isinstance(now, Tensor) or _is_odd(now):
            return False
        if now.shape != self._numbers.shape or now.dtype != self._numbers.dtype:
            return False
        if now.is_inference() or (now.is_cpu and now.numel() <= FEW_NUMBERS):
            return _are_equal(now, self._numbers)
        seen = self._seen
        if seen is None or seen[0]() is not now or seen[1] != now._version:
            self._seen = seen = weakref.ref(now), now._version, _are_equal(now, self._numbers)
        return seen[2]


def _is_odd(tensor: Tensor) -> bool:
    """Whether it is no tensor of PyTorch's own with numbers that can be read one by one."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return not plain or tensor.is_meta or tensor.is_quantized


def _are_equal(tensor: Tensor, numbers: Tensor) -> bool:
    now = tensor.detach().cpu()
    return torch.equal(now, numbers) or bool(((now == numbers) | ((now != now) & (numbers != numbers))).all())


def is_described(kept: Any) -> bool:
    """Whether what is kept of a value is not the value itself."""
    return type(kept) is Numbers or (type(kept) is tuple and len(kept) > 0 and type(kept[0]) is What)


def is_array(value: Any) -> bool:
    """Whether it is an array or a number of NumPy's, which may not be installed."""
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes")


def is_same(now: Any, value: Any) -> bool:
    """Whether something is still as what was kept of it says."""
    if type(value) is Numbers:
        return value.are(now)
    if type(value) is not tuple:
        return type(now) is type(value) and bool(now == value or (now != now and value != value))
    if not is_described(value):
        return isinstance(now, (tuple, list)) and are_same(now, value)
    what, inside = value[0], value[1]
    if what is What.ITEMS and isinstance(now, functools.partial):
        return are_same((now.func, now.args, now.keywords), inside)
    if what is What.ITEMS and is_array(now):
        return are_same((tuple(now.shape), now.ravel().tolist()), inside)
    if what is What.ITEMS:
        return isinstance(now, (list, tuple, collections.deque)) and are_same(now, inside)
    if what is What.ENTRIES:
        return isinstance(now, dict) and are_same(list(now), inside) and are_same(list(now.values()), value[2])
    if what is What.MEMBERS:
        return isinstance(now, (set, frozenset)) and len(now) == value[2] and inside <= now
    if what is What.ARRAY:
        return not _torch.compiling() and is_array(now) and _described(now) == value[1:]
    if what is What.WITH:
        names = value[2]
        return is_same(now, inside) and are_same([getattr(now, name, Absent) for name in names], value[3])
    traced = _torch.compiling() and what is What.OBJECT  # of which the compiler cannot tell all classes
    return traced or kind_of(now) == value


def _described(array: Any) -> tuple[Any, ...]:
    return str(array.dtype), tuple(array.shape), array.tobytes()


def are_same(now: Sequence[Any] | collections.deque[Any], values: tuple[Any, ...]) -> bool:
    """The same of several; what is the same object is so at once."""
    if len(now) != len(values):
        return False
    if not _torch.compiling() and all(map(operator.is_, now, values)):
        return True
    return all(part is value or is_same(part, value) for part, value in zip(now, values, strict=True))


# A word of two, and its class, or a function's name and line.
Kind = tuple[What, str]


def kind_of(value: Any) -> Kind:
    """What is kept of a value that is no data."""
    value = getattr(value, "__func__", value)
    if isinstance(value, types.FunctionType):
        return What.FUNCTION, f"{value.__module__}.{value.__qualname__} {value.__code__.co_firstlineno}"
    if isinstance(value, (types.BuiltinFunctionType, type)):
        return What.FUNCTION, f"{value.__module__}.{value.__qualname__}"
    kind: Any = type(value)
    return _kind_of_type(kind)


@functools.lru_cache(256)
def _kind_of_type(kind: type) -> Kind:
    return What.OBJECT, f"{kind.__module__}.{kind.__qualname__}"


def is_data(value: Any) -> bool:
    """Whether more is kept of a value than its kind."""
    containers = (list, tuple, dict, set, frozenset, collections.deque, Tensor)
    return isinstance(value, (*SCALARS, *containers)) or is_array(value)


def names_of(entries: Iterable[Any]) -> str:
    """A path of names in words."""
    return ".".join(map(str, entries))
