"""Which parts of a module, and which methods of their classes, a call may reach, as far as names in code tell.

A model may hold what its forward pass has no use for, such as a metric that a training step brings up to date, or a
method that draws a picture. What their code writes to is no matter of a forward pass.
"""

from __future__ import annotations

import gc
import io
import logging
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.classes import is_torchs
from mtlkernels._convert.reading import codes, is_own
from mtlkernels._convert.shared_state import classes_of, function_behind, named_by, package_of

# By which code finds parts and methods whose names do not stand in it.
_BY_ANY_NAME = frozenset(
    ("__dict__", "__getattr__", "__getattribute__", "__import__", "_modules", "apply", "attrgetter", "children")
    + ("deepcopy", "dir", "eval", "exec", "get_submodule", "getattr", "getmembers", "globals", "import_module")
    + ("locals", "methodcaller", "modules", "named_children", "named_modules", "pickle", "vars")
)
# Run when an instance or a copy of it is made, and not by its calls.
_MAKING = frozenset(
    ("__copy__", "__deepcopy__", "__getstate__", "__init__", "__init_subclass__", "__new__", "__reduce__")
    + ("__reduce_ex__", "__setstate__")
)
# What classes have of Python's own.
_OF_PYTHON = (types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType)
# A hook may lead to any part.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Objects that lead to much that no forward pass calls, and those that do not say what they stand for.
_LEAVES = (Tensor, types.ModuleType, io.IOBase, logging.Logger)
_WEAK = (weakref.ref, weakref.ProxyType, weakref.CallableProxyType)
# So many objects are looked at; where there are more, all parts are taken to be reached.
_MOST_OBJECTS = 10_000


class Reached:
    """What a method of a module may reach: all of it, where its code finds something by other than its name.

    Attributes:
        parts: the module, and those within it, or that it holds in another way, that code may call.
        functions: the user's functions that code may call, methods among them.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.parts: list[nn.Module] = [module]
        self.functions: list[types.FunctionType] = []
        self._words = {method, "forward"}
        kinds = list(classes_of(module.modules()))
        self._packages = set(map(package_of, kinds))
        self._kinds = frozenset(kinds)  # of which those methods alone are read that are called
        self._named: set[type] = set()  # those of them that code names, though it may reach no part of them
        self._seen: dict[int, Any] = {id(module): module}  # kept, as the address of what is gone is used again
        size = -1
        while size != (size := len(self._words) + len(self._seen)):
            for part in list(self.parts):
                self._follow(part)
            for kind in list(self._named):
                self._follow_class(kind)

    def has(self, name: str) -> bool:
        """Whether a method of that name may be called."""
        by_python = name[:2] == "__" and name not in _MAKING
        return by_python or name in self._words or not self._words.isdisjoint(_BY_ANY_NAME)

    def _follow(self, part: nn.Module) -> None:
        """Notes what a part leads to: what code names of it, or all where its code is not the user's, and not read."""
        kinds = type(part).__mro__[: type(part).__mro__.index(nn.Module)]
        uses_all = not all(is_own(kind, self._packages) for kind in kinds)
        held = [*part._modules.items(), *(item for item in vars(part).items() if item[0] not in _HOOKS)]
        self._note(value for name, value in held if uses_all or self.has(name))
        for kind in classes_of([part]):
            self._follow_class(kind)
        if any(package_of(hook) != "torch" for hooks in _HOOKS for hook in vars(part)[hooks].values()):
            self._words |= _BY_ANY_NAME

    def _follow_class(self, kind: type) -> None:
        for name, attribute in list(vars(kind).items()):
            if self.has(name):
                self._note_attribute(attribute)

    def _note_attribute(self, attribute: Any) -> None:
        """What a class's attribute leads to; all, where it is called and is no function that can be read."""
        readable = function_behind(attribute) is not None or isinstance(attribute, (type, *_OF_PYTHON))
        if not readable and (callable(attribute) or hasattr(type(attribute), "__get__")):
            self._words |= _BY_ANY_NAME
        self._note([attribute])

    def _note(self, values: Iterable[Any]) -> None:
        """Notes parts and functions among values, and what these name or hold in turn, whatever they hold it in."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if id(value) in self._seen or not gc.is_tracked(value) or issubclass(kind, _LEAVES):
                continue
            self._seen[id(value)] = value
            if issubclass(kind, nn.Module):
                self.parts.append(value)
                self._packages.update(map(package_of, classes_of([value])))
            elif issubclass(kind, types.FunctionType):
                waiting += self._read(value)
            elif issubclass(kind, type):
                waiting += [inner for base in value.__mro__ for inner in self._of_class(base)]
            elif issubclass(kind, _WEAK) or len(self._seen) > _MOST_OBJECTS:
                self._words |= _BY_ANY_NAME
            elif not is_torchs(kind):
                waiting += gc.get_referents(value)

    def _read(self, function: types.FunctionType) -> list[Any]:
        """What a function leads to; of one that is not the user's, what it closes over."""
        if not is_own(function, self._packages):
            return [*(function.__closure__ or ())]
        self.functions.append(function)
        self._words |= {word for code in codes(function.__code__) for word in _words(code)}
        return [*vars(function).values(), *(value for *_, value in named_by(function))]

    def _of_class(self, kind: type) -> list[Any]:
        """All methods of a class of the user's, of which code may make or have an object."""
        if kind in self._kinds:
            self._named.add(kind)
            return []
        if not is_own(kind, self._packages):
            return []
        return list(vars(kind).values())


def _words(code: types.CodeType) -> Iterator[Any]:
    yield from code.co_names
    yield from (constant for constant in code.co_consts if isinstance(constant, str))
