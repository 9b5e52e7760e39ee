"""What the code of a class's method reads, as far as its instructions tell: of the instance, and beside it.

Instructions have other names in each version of Python; where one is not known, what was loaded goes elsewhere as a
whole.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from mtlkernels._convert.classes import is_torchs
from mtlkernels._convert.shared_state import is_users, package_of
from mtlkernels._convert.values import Absent

# What follows a name in code, as ("config", "temperature") for ``config.temperature`` and ``config["temperature"]``.
Path = tuple[Any, ...]


class Global(NamedTuple):
    """In the place of a variable's name: it is a global one."""

    name: str


class Scope:
    """Variables that code reads beside its instance: global ones, or those of the functions around it.

    Copies share them. A pickle has the name of the module whose global variables they are.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        module = sys.modules.get(values.get("__name__", ""))
        self._module = module if getattr(module, "__dict__", None) is values else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return self

    def __reduce__(self) -> Any:
        """None of those of a script's function, which another process does not have."""
        return _scope_of, (None if self._module is None else self._module.__name__,)

    def get(self, name: str, compiling: bool = False) -> Any:
        """A variable's value; none where the compiler, which can ask a module alone, cannot see it."""
        if compiling:
            return Absent if self._module is None else getattr(self._module, name, Absent)
        value = self.values.get(name, Absent)
        return value.cell_contents if type(value) is types.CellType else value


def _scope_of(module: str | None) -> Scope:
    return Scope(vars(sys.modules[module]) if module in sys.modules else {})


class Scopes:
    """The variables that some methods read, each with what follows their names."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Scope, set[Path]]] = {}

    def add(self, scope: Scope, paths: set[Path]) -> None:
        """Paths whose first name is that of a variable."""
        if paths:
            self.found.setdefault(id(scope.values), (scope, set()))[1].update(paths)


class Code:
    """What a method of a class, and the methods and properties that it calls in turn, read of ``self``.

    Attributes:
        names: the attributes of ``self``.
        paths: what is read, as ``("config", "temperature")`` for ``self.config.temperature``; as far as is known.
        words: all names and strings in the code, and in functions of the user's that it names, by which what is read
            may be found.
    """

    def __init__(self, kind: type, method: str, scopes: Scopes) -> None:
        self.method, self._scopes = method, scopes
        self.names: set[str] = set()
        self.paths: set[Path] = set()
        self.words: set[Any] = set()
        self._outer: set[int] = set()
        kinds = [base for base in kind.__mro__ if not is_torchs(base) and base is not object]
        self._packages = set(map(package_of, kinds))
        waiting, seen = [(method, 0)], set()
        while waiting:
            name, start = waiting.pop()
            at = next((i for i in range(start, len(kinds)) if name in vars(kinds[i])), None)
            if at is None or (name, at) in seen:
                continue
            seen.add((name, at))
            for function in functions_of(vars(kinds[at])[name]):
                found, words = self._read(function)
                waiting += [(other, 0) for other in found]
                if "super" in words:
                    waiting += [(other, at + 1) for other in words if isinstance(other, str)]

    def _read(self, function: types.FunctionType) -> tuple[set[str], set[Any]]:
        """The attributes of ``self`` in a function's code, and all of its words."""
        paths: set[Path] = set()
        words: set[Any] = set()
        this = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
        escapes = not this
        for code in codes(function.__code__):
            words |= _words(code)
            found = paths_after(code)
            of_this = {path[1:] for path in found if path[:1] == this}
            paths |= of_this - {()}
            escapes = escapes or () in of_this
        named = self._read_around(function)
        if escapes:  # to functions of the user's, perhaps
            words |= {word for f in named for code in codes(f.__code__) for word in code.co_names}
        names = {path[0] for path in paths} | ({word for word in words if word.isidentifier()} if escapes else set())
        self.names |= names
        self.paths |= paths | ({(name,) for name in names} if escapes else set())
        self.words |= words
        return names, words

    def _read_around(self, function: types.FunctionType) -> list[types.FunctionType]:
        """Notes the variables around a function that it reads, and those of the user's functions that it names.

        Gives the functions among the variables.
        """
        loaded = {path for code in codes(function.__code__) for path in paths_after(code)}
        around = {(path[0].name, *path[1:]) for path in loaded if isinstance(path[0], Global)}
        values = function.__globals__
        self._scopes.add(Scope(values), around)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._scopes.add(Scope(cells), {path for path in loaded if path[0] in cells and path[0] != "__class__"})
        named = [values.get(name) for name, *_ in around]
        modules = [(values.get(name), inner[0]) for name, *inner in around if inner]
        inside = [vars(value).get(name) for value, name in modules if isinstance(value, types.ModuleType)]
        functions = [value for value in named if isinstance(value, types.FunctionType)]
        for other in (*functions, *(value for value in inside if isinstance(value, types.FunctionType))):
            if id(other) not in self._outer and is_own(other, self._packages):
                self._outer.add(id(other))
                self.words |= {word for code in codes(other.__code__) for word in _words(code)}
                self._read_around(other)
        return functions


def is_own(code: type | types.FunctionType | types.ModuleType, packages: Collection[str] = ()) -> bool:
    """Whether a class, a function or a module is the user's, and not a library's that is installed."""
    package = package_of(code)
    if package in packages or package == "mtlkernels":
        return package != "mtlkernels"
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return is_users(code) and not ("site-packages" in file or "dist-packages" in file)


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """Those behind an attribute of a class, with what they wrap."""
    for part in (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),):
        while isinstance(part, types.FunctionType):
            yield part
            part = getattr(part, "__wrapped__", None)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code, and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _words(code: types.CodeType) -> set[Any]:
    return {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}


@functools.lru_cache(1024)
def paths_after(code: types.CodeType) -> frozenset[Path]:
    """The paths that begin with a variable that a code loads: its name alone where it goes elsewhere by itself."""
    found: set[Path] = set()
    path: Path = ()
    constant: Any = Absent
    for step in dis.get_instructions(code):
        name = step.opname
        if name in ("CACHE", "RESUME", "EXTENDED_ARG"):
            continue
        is_inside = len(path) > 1 or (len(path) == 1 and isinstance(path[0], Global))  # what a class's own index is not
        if path and name in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, step.argval)
        elif is_inside and name in ("LOAD_CONST", "LOAD_SMALL_INT") and isinstance(step.argval, (str, int)):
            constant = step.argval
            continue
        elif path and constant is not Absent and (name == "BINARY_SUBSCR" or step.argrepr == "[]"):
            path = (*path, constant)
        else:
            if path and not (len(path) == 1 and name == "STORE_ATTR"):
                found.add(path)
            path = ()
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            found |= {(other,) for other in loaded[:-1] if isinstance(other, str)}
            if "LOAD_FAST" in name or name == "LOAD_DEREF":
                path = (loaded[-1],)
            elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
                path = (Global(str(step.argval)),)
        constant = Absent
    return frozenset(found | ({path} if path else set()))
