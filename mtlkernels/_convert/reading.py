"""What the code of a class's method reads, as far as its instructions tell: of the instance, and beside it.

Instructions have other names in each version of Python; where one is not known, what was loaded goes elsewhere as a
whole.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from mtlkernels._convert.arguments import Absent
from mtlkernels._convert.classes import is_torchs
from mtlkernels._convert.shared_state import is_users, package_of

# By which objects are made, printed, copied and dropped.
_ASIDE = frozenset(
    f"__{name}__"
    for name in (
        *("init", "new", "post_init", "init_subclass", "class_getitem", "set_name", "del", "repr", "str", "format"),
        *("sizeof", "dir", "hash", "copy", "deepcopy", "reduce", "reduce_ex", "getstate", "setstate", "getnewargs"),
        "getnewargs_ex",
    )
)
_CACHED = type(functools.lru_cache(len))
_METHODS = (functools.partialmethod, functools.singledispatchmethod)
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

    def add(self, values: Any, scope: Scope, paths: set[Path]) -> None:
        """Paths whose first name is that of a variable among ``values``, a module's or a function's own."""
        if paths:
            self.found.setdefault(id(values), (scope, set()))[1].update(paths)


class Surroundings:
    """The variables around functions that they read, and those of the user's functions that they name.

    Attributes:
        words: all names and strings in the code of functions of the user's that they name.
        scopes: the variables.
    """

    def __init__(self, scopes: Scopes, packages: set[str]) -> None:
        self.scopes, self.packages = scopes, packages
        self.words: set[Any] = set()
        self._seen: set[int] = set()

    def read(self, function: types.FunctionType, cells: bool = True) -> list[types.FunctionType]:
        """Notes what is around a function, and gives the functions among it; its ``cells`` may be watched elsewhere."""
        loaded = {path for code in codes(function.__code__) for path in paths_after(code)}
        around = {(path[0].name, *path[1:]) for path in loaded if isinstance(path[0], Global)}
        values = function.__globals__
        self.scopes.add(values, Scope(values), around)
        if cells:
            inner = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            paths = {path for path in loaded if path[0] in inner and path[0] != "__class__"}
            self.scopes.add(function.__closure__, Scope(inner), paths)
        named = [values.get(name) for name, *_ in around]
        modules = [(values.get(name), further[0]) for name, *further in around if further]
        inside = [vars(value).get(name) for value, name in modules if isinstance(value, types.ModuleType)]
        functions = [function for value in named for function in functions_of(value)]
        for other in (*functions, *(function for value in inside for function in functions_of(value))):
            self.learn(other)
        return functions

    def learn(self, function: types.FunctionType, cells: bool = True) -> None:
        """The same, and its words, of a function of the user's."""
        if id(function) not in self._seen and is_own(function, self.packages):
            self._seen.add(id(function))
            self.words |= {word for code in codes(function.__code__) for word in _words(code)}
            self.read(function, cells)


class Code:
    """What methods of a class, and the methods and properties that they call in turn, read of ``self``.

    Attributes:
        methods: their names.
        names: the attributes of ``self``.
        paths: what is read, as ``("config", "temperature")`` for ``self.config.temperature``; as far as is known.
        words: all names and strings in the code, and in functions of the user's that it names, by which what is read
            may be found.
        packages: of the class and its bases.
    """

    def __init__(self, kind: type, methods: Iterable[str], scopes: Scopes) -> None:
        self.methods = set(methods)
        self.names: set[str] = set()
        self.paths: set[Path] = set()
        self.words: set[Any] = set()
        kinds = [base for base in kind.__mro__ if not is_torchs(base) and base is not object]
        self.packages = set(map(package_of, kinds))
        self._around = Surroundings(scopes, self.packages)
        waiting, seen = [(method, 0) for method in self.methods], set()
        while waiting:
            name, start = waiting.pop()
            at = next((i for i in range(start, len(kinds)) if name in vars(kinds[i])), None)
            if at is None or (name, at) in seen:
                continue
            seen.add((name, at))
            for function in functions_of(vars(kinds[at])[name]):
                found, words = self._read(function, kind)
                waiting += [(other, 0) for other in found]
                if "super" in words:
                    waiting += [(other, at + 1) for other in words if isinstance(other, str)]
        self.words |= self._around.words

    def _read(self, function: types.FunctionType, kind: type) -> tuple[set[str], set[Any]]:
        """The attributes of ``self`` in a function's code, and all of its words."""
        paths: set[Path] = set()
        words: set[Any] = set()
        this = function.__code__.co_varnames[:1] if function.__code__.co_argcount else ()
        escapes = not this
        called: set[str] = set()
        for code in codes(function.__code__):
            words |= _words(code)
            found = paths_after(code)
            of_this = {tuple(n for n in path[1:] if n != "__dict__") for path in found if path[:1] == this}
            paths |= of_this - {()}
            if () in of_this:
                escapes, called = True, methods_of(kind, ())
        named = self._around.read(function)
        if escapes:  # to functions of the user's, perhaps
            words |= {word for f in named for code in codes(f.__code__) for word in code.co_names}
        names = {path[0] for path in paths} | ({word for word in words if word.isidentifier()} if escapes else set())
        self.names |= names
        self.paths |= paths | ({(name,) for name in names} if escapes else set())
        self.words |= words
        return names | called, words


def is_own(code: type | types.FunctionType | types.ModuleType, packages: Collection[str] = ()) -> bool:
    """Whether a class, a function or a module is the user's, and not a library's that is installed."""
    package = package_of(code)
    if package in packages or package == "mtlkernels":
        return package != "mtlkernels"
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return is_users(code) and not ("site-packages" in file or "dist-packages" in file)


def methods_of(kind: type, words: Collection[Any]) -> set[str]:
    """The methods of the user's by which code may read an object that it has as a whole.

    They are those of ``words``, and those that a call, an operator or a loop takes.
    """
    own = {name for base in kind.__mro__ if is_users(base) for name, value in vars(base).items() if _is_code(value)}
    special = {name for name in own if name[:2] == "__" == name[-2:]} - _ASIDE
    if dataclasses.is_dataclass(kind):
        special.discard("__eq__")  # which reads all there is
    return special | {name for name in own if name in words}


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, property, classmethod, staticmethod, *_METHODS, _CACHED))


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """Those behind an attribute of a class or a variable, with what they wrap, but none of PyTorch's wrappers."""
    parts: Iterable[Any] = (getattr(value, "__func__", value),)
    if isinstance(value, property):
        parts = (value.fget, value.fset)
    elif isinstance(value, functools.partialmethod):
        parts = (value.func,)
    elif isinstance(value, functools.singledispatchmethod):
        parts = value.dispatcher.registry.values()
    for part in parts:
        while isinstance(part, (types.FunctionType, _CACHED)):
            if isinstance(part, types.FunctionType) and not _is_torchs_code(part):
                yield part
            part = getattr(part, "__wrapped__", None)


def _is_torchs_code(function: types.FunctionType) -> bool:
    """Whether PyTorch has written it, as it has what ``torch.no_grad`` puts around a function of the same name."""
    return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code, and those of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def _words(code: types.CodeType) -> set[Any]:
    return {*code.co_names, *_words_in(code.co_consts)}


def _words_in(constants: Iterable[Any]) -> Iterator[str]:
    """Also those in tuples, over which code goes, and those of a path."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
            yield from constant.split(".") if "." in constant else ()
        elif isinstance(constant, (tuple, frozenset)):
            yield from _words_in(constant)


@functools.lru_cache(1024)
def paths_after(code: types.CodeType) -> frozenset[Path]:
    """The paths that begin with a variable that a code loads: its name alone where it goes elsewhere by itself."""
    found: set[Path] = set()
    path: Path = ()
    constant: Any = Absent
    cells = {*code.co_cellvars, *code.co_freevars}
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
            # Of an instance alone, super() is told by its word.
            asks_super = name == "LOAD_SUPER_ATTR" and not (step.arg or 0) & 2
            if path and not (len(path) == 1 and (name == "STORE_ATTR" or asks_super)):
                found.add(path)
            path = ()
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            if "LOAD_FAST" in name:  # cells go to functions in this one, which are read by themselves
                loaded = tuple("" if other in cells else other for other in loaded)
            found |= {(other,) for other in loaded[:-1] if isinstance(other, str) and other}
            fast = "LOAD_FAST" in name and name != "LOAD_FAST_AND_CLEAR" and loaded[-1]
            if fast or name == "LOAD_DEREF":
                path = (loaded[-1],)
            elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
                path = (Global(str(step.argval)),)
        constant = Absent
    return frozenset(found | ({path} if path else set()))
