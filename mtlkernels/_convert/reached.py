"""Which parts of a module, and which methods of their classes, a call may reach, as far as names in code tell.

A model may hold what its forward pass has no use for, such as a metric that a training step brings up to date, or a
method that draws a picture. What their code writes to is no matter of a forward pass.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from mtlkernels._convert.classes import is_torchs
from mtlkernels._convert.reading import codes, is_own
from mtlkernels._convert.shared_state import (
    classes_in,
    classes_of,
    function_behind,
    functions_in,
    named_by,
    package_of,
)

# By which code finds parts and methods whose names do not stand in it.
_BY_ANY_NAME = frozenset(
    ("__dict__", "__getattribute__", "__import__", "_modules", "apply", "attrgetter", "children", "deepcopy", "dir")
    + ("eval", "exec", "get_submodule", "getattr", "getmembers", "globals", "import_module", "locals", "methodcaller")
    + ("modules", "named_children", "named_modules", "pickle", "vars")
)
# Run when an instance or a copy of it is made, and not by its calls.
_MAKING = frozenset(
    ("__copy__", "__deepcopy__", "__getstate__", "__init__", "__init_subclass__", "__new__", "__reduce__")
    + ("__reduce_ex__", "__setstate__")
)
# What classes have of Python's own.
_OF_PYTHON = (types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType)


class Reached:
    """What a method of a module may reach: all of it, where its code finds something by other than its name.

    Attributes:
        parts: the module, and those within it that code may call.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.parts: list[nn.Module] = [module]
        self._known = {id(module)}
        self._words = {method, "forward"}
        kinds = list(classes_of(module.modules()))
        self._packages = set(map(package_of, kinds))
        self._read = set(map(id, kinds))  # of whose methods those are read that are called
        size = -1
        while size != (size := len(self.parts) + len(self._words) + len(self._read)):
            for part in list(self.parts):
                self._follow(part)
        if not self._words.isdisjoint(_BY_ANY_NAME):
            self.parts = list(module.modules())

    def has(self, name: str) -> bool:
        """Whether a method of that name may be called."""
        by_python = name[:2] == "__" and name not in _MAKING
        return by_python or name in self._words or not self._words.isdisjoint(_BY_ANY_NAME)

    def _follow(self, part: nn.Module) -> None:
        """Notes what a part leads to: parts that code names, or that one of PyTorch's classes calls by itself."""
        kinds = type(part).__mro__[: type(part).__mro__.index(nn.Module)]
        calls_all = any(map(is_torchs, kinds))
        for name, inner in part._modules.items():
            if inner is not None and (calls_all or name in self._words):
                self._add(inner)
        for kind in classes_of([part]):
            for name, attribute in list(vars(kind).items()):
                if self.has(name):
                    self._note_attribute(attribute)
        for name, value in list(vars(part).items()):
            if name != "_modules":
                self._note_value(value)
                for kind in classes_in(value, set()):
                    self._note_class(kind)
        for function in functions_in(vars(part)):
            self._note(function)

    def _add(self, part: nn.Module) -> None:
        if id(part) not in self._known:
            self._known.add(id(part))
            self.parts.append(part)

    def _note_attribute(self, attribute: Any) -> None:
        """What is called by a class's attribute; all, where it is called and is no function that can be read."""
        function = function_behind(attribute)
        if function is not None:
            self._note(function)
        elif not isinstance(attribute, (type, *_OF_PYTHON)) and (
            callable(attribute) or hasattr(type(attribute), "__get__")
        ):
            self._words |= _BY_ANY_NAME

    def _note(self, function: types.FunctionType) -> None:
        """Notes the words of a function's code, and of what the user's code calls in turn."""
        if id(function) in self._read or not is_own(function, self._packages):
            return
        self._read.add(id(function))
        self._words |= {word for code in codes(function.__code__) for word in _words(code)}
        for *_, value in named_by(function):
            self._note_value(value)

    def _note_value(self, value: Any) -> None:
        """The same of a function, one that is bound or has some of its arguments, a class or an object."""
        if isinstance(value, functools.partial):
            for inner in (value.func, *value.args, *value.keywords.values()):
                self._note_value(inner)
            return
        owner = getattr(value, "__self__", None) if isinstance(value, types.MethodType) else None
        if isinstance(owner, nn.Module):
            self._add(owner)
        function = function_behind(value)
        if function is not None:
            self._note(function)
        else:
            self._note_class(value if isinstance(value, type) else type(value))

    def _note_class(self, kind: type) -> None:
        """The same of all methods of a class, of which code may make or have an object."""
        if id(kind) in self._read or not is_own(kind, self._packages):
            return
        self._read.add(id(kind))
        for attribute in list(vars(kind).values()):
            function = function_behind(attribute)
            if function is not None:
                self._note(function)


def _words(code: types.CodeType) -> Iterator[Any]:
    yield from code.co_names
    yield from (constant for constant in code.co_consts if isinstance(constant, str))
