"""What is kept of a value that code reads, so that another one is told from it later.

What is kept is data that copies and pickles of a module can have: numbers and words, what is in containers of them and
around functions, and of all else its kind alone. ``keeping.py`` makes it of values.
"""

from __future__ import annotations

import collections
import enum
import functools
import importlib.util
import logging
import marshal
import operator
import random
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.arguments import Absent
from mtlkernels._convert.classes import original_class
from mtlkernels._convert.shared_state import MOST_NUMBERS, is_users

SCALARS = (bool, int, float, complex, str, bytes, range, type(None), torch.dtype, torch.Size, enum.Enum)
# Numbers of a tensor on a CPU that each call compares.
FEW_NUMBERS = 1024
# Of which the compiler cannot tell the class.
_UNTOLD = (logging.Logger, random.Random, weakref.ref)


class What(enum.Enum):
    """What stands behind it in a tuple, in the place of a value that is no number, word or tuple of these."""

    OBJECT = "an object: its class"
    ITSELF = "a class, or a function that is not of Python: itself"
    FUNCTION = "a function: its code, and what is kept of what it has beside it; None where that is kept elsewhere"
    METHOD = "a method of an object: what is kept of its function and of the object"
    GETTER = "one of Python's operator module: what is kept of that of which it is made"
    WITH = "an object with some of its attributes: its class, their names, and what is kept of them"
    ITEMS = "a list: what is kept of its entries"
    ENTRIES = "a dictionary: the same of its keys and of its values"
    MEMBERS = "a set: those members that are numbers, words or tuples of these, and how many there are"
    ARRAY = "an array or a number of NumPy's: its dtype, shape and bytes"


class TooMuch(ValueError):
    """More than a call should compare."""


class Named:
    """A class, or a function that is not of Python: itself. Copies share it; a pickle has its name."""

    def __init__(self, name: str, value: Any = Absent) -> None:
        self._name, self._value = name, value
        self.is_untold = isinstance(value, type) and issubclass(value, _UNTOLD)
        self.is_users = isinstance(value, type) and is_users(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Named:
        return self

    def __reduce__(self) -> Any:
        """By its name."""
        return Named, (self._name,)

    def __repr__(self) -> str:
        return self._name

    def is_it(self, now: Any) -> bool:
        """Whether a value is the same class or function."""
        return now is self._value or (self._value is Absent and _name_of(now) == self._name)

    def is_class_of(self, now: Any) -> bool:
        """Whether a value is of this class, or of the one that a conversion has made of it."""
        if self.is_untold and torch.compiler.is_dynamo_compiling():
            return True
        kind = type(now)
        return self.is_it(kind) or self.is_it(original_class(kind))


class Instructions:
    """A function's code. Copies share it; a pickle has it for the same version of Python, as Python's own files do."""

    def __init__(self, code: types.CodeType | None) -> None:
        self._code = code
        self.has_cells = code is not None and len(code.co_freevars) > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Instructions:
        return self

    def __reduce__(self) -> Any:
        """By Python's own format."""
        return _loaded, (importlib.util.MAGIC_NUMBER, None if self._code is None else marshal.dumps(self._code))

    def are_of(self, now: Any) -> bool:
        """Whether a value is a function of this code."""
        return isinstance(now, types.FunctionType) and (now.__code__ is self._code or now.__code__ == self._code)


def _loaded(version: bytes, code: bytes | None) -> Instructions:
    readable = code is not None and version == importlib.util.MAGIC_NUMBER
    return Instructions(marshal.loads(code) if readable else None)  # type: ignore[arg-type]


def beside(function: types.FunctionType) -> tuple[Any, ...]:
    """What a function has beside its code: the variables around it, and its defaults."""
    cells, defaults, by_name = function.__closure__, function.__defaults__, function.__kwdefaults__
    if cells is None and not defaults and not by_name:
        return ()
    return tuple([_contents(cell) for cell in cells or ()]), defaults, by_name


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return Absent


class Numbers:
    """The numbers of a tensor that is neither a parameter nor a buffer of floating-point numbers.

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
        if _torch.compiling() or not isinstance(now, Tensor) or is_odd(now):
            return False
        if now.shape != self._numbers.shape or now.dtype != self._numbers.dtype:
            return False
        if now.is_inference() or (now.is_cpu and now.numel() <= FEW_NUMBERS):
            return _are_equal(now, self._numbers)
        seen = self._seen
        if seen is None or seen[0]() is not now or seen[1] != now._version:
            self._seen = seen = weakref.ref(now), now._version, _are_equal(now, self._numbers)
        return seen[2]


def is_odd(tensor: Tensor) -> bool:
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
    if what is What.WITH:
        names = value[2]
        return is_same(now, inside) and are_same([getattr(now, name, Absent) for name in names], value[3])
    if what is What.OBJECT:
        return bool(inside.is_class_of(now))
    if what is What.ITSELF:
        return bool(inside.is_it(now))
    if what is What.FUNCTION and inside.has_cells and torch.compiler.is_dynamo_compiling():
        return False  # the compiler cannot look at the variables around a function before it compiles that
    if what is What.FUNCTION:
        return inside.are_of(now) and (value[2] is None or is_same(beside(now), value[2]))
    if what is What.METHOD:
        return isinstance(now, types.MethodType) and are_same((now.__func__, now.__self__), inside)
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
    return is_getter(now) and not torch.compiler.is_dynamo_compiling() and is_same(now.__reduce__(), inside)


def _described(array: Any) -> tuple[Any, ...]:
    return str(array.dtype), tuple(array.shape), array.tobytes()


def are_same(now: Sequence[Any] | collections.deque[Any], values: tuple[Any, ...]) -> bool:
    """The same of several; what is the same object is so at once."""
    if len(now) != len(values):
        return False
    if not _torch.compiling() and all(map(operator.is_, now, values)):
        return True
    return all(part is value or is_same(part, value) for part, value in zip(now, values, strict=True))


def kind_of(value: Any) -> tuple[What, Named]:
    """What is kept of a value that is no data, or whose data is kept elsewhere."""
    what = What.ITSELF if isinstance(value, type) or _is_function(value) else What.OBJECT
    named = value if what is What.ITSELF else original_class(type(value)) or type(value)
    return what, Named(_name_of(named), named)


def _is_function(value: Any) -> bool:
    """Whether it is called as one, and is neither of Python's code nor an object of the user's."""
    return callable(value) and not (is_users(type(value)) or isinstance(value, (nn.Module, weakref.ref)))


def _name_of(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"


def is_getter(value: Any) -> bool:
    """Whether it is a function that the operator module makes, as of a method's name."""
    return isinstance(value, (operator.attrgetter, operator.itemgetter, operator.methodcaller))


def is_data(value: Any) -> bool:
    """Whether more is kept of a value than its kind."""
    containers = (list, tuple, dict, set, frozenset, collections.deque, functools.partial, Tensor)
    return isinstance(value, (*SCALARS, *containers)) or is_array(value)


def names_of(entries: Iterable[Any]) -> str:
    """A path of names in words."""
    return ".".join(map(str, entries))
