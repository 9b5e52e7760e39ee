"""What a module's code may write to that is not the module's own: attributes of classes, and global variables.

Tensors and arrays are compared by their values, containers by what is in them, all else by what a name stands for. What
is larger than a trial should copy, files, loggers, and generators of the user's own are not looked at.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtlkernels.routing import Routing

if TYPE_CHECKING:
    from mtlkernels._convert.reached import Reached

_NAMESPACES = ("types.SimpleNamespace", "argparse.Namespace", "_thread._local")
_CONTAINERS = (list, dict, set, collections.deque)
# Of a container that is looked into, and of a tensor or an array that is copied.
MOST_PARTS, MOST_NUMBERS = 1000, 2**20


@dataclass(frozen=True)
class _Kept:
    """Something as it was: its name, whether it has changed, how to have it back, and whether it may not change."""

    name: str
    has_changed: Callable[[], bool]
    restore: Callable[[], None]
    judged: bool


class SharedState:
    """The class attributes, global variables and objects that the code of a module's classes names, as they are now.

    Code is that of methods that a call may reach, also of an instance's own, and of the user's functions that it names
    in turn. What a module's hooks name is restored too, but may change: they are called as before a conversion, or keep
    their module as it is.
    """

    def __init__(self, module: nn.Module, reached: Reached) -> None:
        self._kept: list[_Kept] = []
        self._seen: set[int] = set()
        self._judged = True
        self._packages = set(map(package_of, classes_of(module.modules())))
        for kind in classes_of(reached.parts):
            self._keep_class(kind)
            for name, attribute in list(vars(kind).items()):
                code = function_behind(attribute)
                if code is not None and reached.has(name):
                    self._keep_named(code)
        for part in reached.parts:
            for code in functions_in(vars(part)):
                if is_users(code):
                    self._keep_named(code)
        for code in reached.functions:
            self._keep_named(code)
        self._judged = False
        for hook in _hooks(module):
            self._keep_named(hook)
        self._judged = True

    def keep_common(self, module: nn.Module, other: nn.Module) -> None:
        """What a copy shares with its original: objects that have a file or say how they are copied, and classes.

        Those are classes that it holds, and those of objects that it holds.
        """
        parts = dict(other.named_modules())
        for path, part in module.named_modules():
            own = vars(parts[path]) if path in parts else {}
            for name, value in list(vars(part).items()):
                where = f"{path}.{name}".lstrip(".")
                if own.get(name) is value:
                    self._keep(where, value)
                for kind in classes_in(value, set()):
                    self._keep(where, kind)

    def _add(self, name: str, has_changed: Callable[[], bool], restore: Callable[[], None]) -> None:
        self._kept.append(_Kept(name, has_changed, restore, self._judged))

    def _keep_class(self, kind: type) -> None:
        """What a class has, and that it has nothing more; ``__doc__`` and the like are its own."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        before = dict(vars(kind))
        for name, value in before.items():
            if name[:2] != "__":
                self._keep_entry(f"{kind.__name__}.{name}", lambda: vars(kind), name, value, _setter(kind, name, value))
                self._keep(f"{kind.__name__}.{name}", value)

        def added() -> list[str]:
            return [name for name in vars(kind) if name not in before and name[:2] != "__"]

        def restore() -> None:
            for name in added():
                delattr(kind, name)

        self._add(kind.__name__, lambda: bool(added()), restore)

    def _keep_entry(
        self, name: str, owner: Callable[[], Any], key: str, value: Any, restore: Callable[[], None]
    ) -> None:
        """What a name stands for."""
        self._add(name, lambda: owner().get(key) is not value, restore)

    def _keep_named(self, function: types.FunctionType) -> None:
        """What a function names, or one of the functions that it names."""
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        for name, owner, key, value in named_by(function):
            if isinstance(owner, dict) and is_users(function):
                self._keep_entry(name, lambda o=owner: o, key, value, _setter(owner, key, value))  # type: ignore[misc]
            elif isinstance(owner, types.CellType):
                self._add(name, _is_refilled(owner, value), _setter(owner, "cell_contents", value))
            if not isinstance(value, types.FunctionType):
                self._keep(name, value)
            elif is_users(value):
                self._keep_named(value)

    def _keep(self, name: str, value: Any) -> None:
        """A container, or an object of the user's with the containers in it."""
        if id(value) in self._seen:
            return
        if isinstance(value, _CONTAINERS):
            self._keep_container(name, value)
        elif type(value) in (Tensor, nn.Parameter):
            plain = value.layout is torch.strided and not (value.is_meta or value.is_quantized)
            if plain and value.numel() <= MOST_NUMBERS:
                self._keep_array(name, value, value.detach().clone())
        elif type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            if value.size <= MOST_NUMBERS:
                self._keep_array(name, value, value.copy())
        elif isinstance(value, type):
            # Those of other packages, such as of progress bars, have their lives.
            if package_of(value) in self._packages:
                self._keep_class(value)
        elif isinstance(value, nn.Module):
            self._seen.add(id(value))
            for part in value.modules():
                self._keep(name, vars(part))
                for tensor in (*part._parameters.values(), *part._buffers.values()):
                    self._keep(name, tensor)
        elif is_object(value) and not isinstance(value, Routing):  # that keeps what was made for it, unseen
            self._seen.add(id(value))
            self._keep(name, vars(value))
            for inner, part in list(vars(value).items()):
                self._keep(f"{name}.{inner}", part)

    def _keep_container(self, name: str, value: Any) -> None:
        self._seen.add(id(value))
        try:
            before = value.copy()
        except Exception:  # of a class of the user's, which copies otherwise
            return

        def has_changed() -> bool:
            return len(value) != len(before) or not all(map(_is, _parts(value), _parts(before)))

        def restore() -> None:
            value.clear()
            (value.extend if isinstance(value, (list, collections.deque)) else value.update)(before)

        self._add(name, has_changed, restore)
        if len(value) <= MOST_PARTS:
            for part in list(value.values()) if isinstance(value, dict) else list(value):
                if isinstance(part, _CONTAINERS):
                    self._keep(name, part)

    def _keep_array(self, name: str, value: Any, before: Any) -> None:
        self._seen.add(id(value))

        def restore() -> None:
            with torch.no_grad():
                value[...] = before

        self._add(name, lambda: not _is_equal(value, before), restore)

    def change(self) -> str | None:
        """The name of something that is no longer as it was."""
        return next((kept.name for kept in self._kept if kept.judged and kept.has_changed()), None)

    def restore(self) -> None:
        """Makes it as it was, where it has changed."""
        for kept in self._kept:
            if kept.has_changed():
                kept.restore()


def _setter(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Gives an attribute, or an entry of a dictionary, its value back."""
    return functools.partial(
        owner.__setitem__ if isinstance(owner, dict) else functools.partial(setattr, owner), name, value
    )


def _is_refilled(cell: types.CellType, value: Any) -> Callable[[], bool]:
    def is_refilled() -> bool:
        try:
            return cell.cell_contents is not value
        except ValueError:  # emptied
            return True

    return is_refilled


def _is(a: Any, b: Any) -> bool:
    return a is b


def _is_equal(value: Any, before: Any) -> bool:
    """Of tensors and arrays, whose shapes do not change."""
    if isinstance(value, Tensor):
        return value.shape == before.shape and torch.equal(value.detach().nan_to_num(), before.nan_to_num())
    return bool(value.tobytes() == before.tobytes())


def _parts(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [part for pair in container.items() for part in pair]
    return sorted(container, key=id) if isinstance(container, set) else list(container)


def classes_of(parts: Iterable[nn.Module]) -> Iterator[type]:
    """The classes of parts but PyTorch's own."""
    kinds = dict.fromkeys(kind for part in parts for kind in type(part).__mro__ if kind is not object)
    return filter(is_users, kinds)


def classes_in(value: Any, seen: set[int]) -> Iterator[type]:
    """The classes in a value, and those of the objects in it, within containers and objects."""
    if id(value) in seen or len(seen) > MOST_PARTS:
        return
    seen.add(id(value))
    parts: Iterable[Any] = ()
    if isinstance(value, type):
        yield value
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (tuple, *_CONTAINERS)):
        parts = value
    elif is_object(value):
        yield type(value)
        parts = vars(value).values()
    for part in list(parts):
        yield from classes_in(part, seen)


def is_users(code: type | types.FunctionType | types.ModuleType) -> bool:
    """Whether a class, a function or a module is neither PyTorch's nor Python's own."""
    package = package_of(code)
    return package not in ("torch", "numpy") and package not in sys.stdlib_module_names


def package_of(code: type | types.FunctionType | types.ModuleType) -> str:
    name = code.__name__ if isinstance(code, types.ModuleType) else code.__module__ or ""
    return name.partition(".")[0]


def is_object(value: Any) -> bool:
    """Whether it is an object of a class of the user's that keeps something, or a namespace, and no module."""
    kind = type(value)
    try:
        if not hasattr(value, "__dict__") or isinstance(value, (type, nn.Module, Tensor, types.FunctionType)):
            return False
        return is_users(kind) or f"{kind.__module__}.{kind.__name__}" in _NAMESPACES
    except Exception:  # of code that is not ours
        return False


def function_behind(attribute: Any) -> types.FunctionType | None:
    """The function behind a class's attribute."""
    try:
        if isinstance(attribute, property):
            attribute = attribute.fget
        attribute = getattr(attribute, "__func__", attribute)  # of a static method, or of a class's
    except Exception:  # of a weak reference's proxy, say, whose object is gone
        return None
    return attribute if isinstance(attribute, types.FunctionType) else None


def functions_in(values: dict[str, Any]) -> Iterator[types.FunctionType]:
    """Those among a module's attributes, and in lists and dictionaries of them."""
    for value in values.values():
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
        yield from (code for code in map(function_behind, inner) if code is not None)


def _hooks(module: nn.Module) -> Iterator[types.FunctionType]:
    """The functions among the hooks of a module and its parts; of hooks that are objects, copies are called."""
    for part in module.modules():
        for kind in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks):
            yield from (hook for hook in kind.values() if isinstance(hook, types.FunctionType))


def named_by(function: types.FunctionType) -> Iterator[tuple[str, Any, str, Any]]:
    """The global variables, those of enclosing functions and of modules, and the defaults that a function names.

    Of each its name, where it is kept (a dictionary, a cell or None), by which key, and what it is.
    """
    codes, names = [function.__code__], set()
    for code in codes:
        names |= {*code.co_names}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    own = function.__globals__
    for name in sorted(names):
        if name not in own:
            continue
        value = own[name]
        yield name, own, name, value
        if isinstance(value, types.ModuleType) and is_users(value):
            inside = vars(value)
            yield from ((f"{name}.{inner}", inside, inner, inside[inner]) for inner in sorted(names & inside.keys()))
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield f"a default of {function.__name__}", None, "", value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell, "", cell.cell_contents
        except ValueError:  # not filled yet
            continue
