"""How a module changes its behaviour in place: it gets a subclass of its own class.

A method bound on the instance would follow it into ``copy.deepcopy`` still bound to the old instance, and would not
pickle. A subclass, as ``torch.nn.utils.parametrize`` and FSDP2 make them, leaves the instance as it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mtlkernels import _tracing
from mtlkernels._convert.report import Line

# What the fused method needs to know of an instance, which must be picklable, or None where nothing of it can be fused,
# and the lines of the report.
Plan = tuple[Any, list[Line]]

CLASS_ATTRIBUTE = "_mtlkernels_original"
PLAN = "_mtlkernels_plan"
_UNSCRIPTED = "__jit_unused_properties__"


@dataclass(frozen=True)
class Converter:
    """How one class of a library is converted.

    Args:
        plan: from an instance and its path in the model, its plan.
        mixin: a subclass of :class:`Converted` with the fused method.
        method: the fused method's name where the mix-in has it to be made for any name.
    """

    plan: Callable[[nn.Module, str], Plan]
    mixin: type[Converted]
    method: str = "forward"


class Converted:
    """Base of the mix-ins with fused methods."""

    _mtlkernels_original: type
    _mtlkernels_plan: Any
    _mtlkernels_force = False
    _mtlkernels_method = "forward"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies by mix-in and original class: the class made of the two has no name to import it by."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        kind = type(self)
        if CLASS_ATTRIBUTE not in vars(kind):
            return reduced
        method = () if kind._mtlkernels_method == "forward" else (kind._mtlkernels_method,)
        return (_rebuild, (kind.__bases__[0], kind._mtlkernels_original, *method), *reduced[2:])

    @classmethod
    def _mtlkernels_planned(cls, base: type, module: nn.Module, path: str) -> Plan:
        """The plan of an instance of ``base`` at that path in the model."""
        raise NotImplementedError

    @classmethod
    def _mtlkernels_fused(cls, name: str) -> Callable[..., Any]:
        """The fused method of that name, of a mix-in that does not have it for one name only."""
        raise NotImplementedError


def _rebuild(mixin: type[Converted], original: type, method: str = "forward") -> Any:
    kind = converted_class(mixin, original, method)
    return kind.__new__(kind)


_classes: dict[tuple[type, type, str], Any] = {}


def converted_class(mixin: type[Converted], original: type, method: str = "forward") -> Any:
    """The subclass of ``original`` with the methods of ``mixin``, always the same one."""
    key = (mixin, original, method)
    if key in _classes:
        return _classes[key]
    namespace: dict[str, Any] = {CLASS_ATTRIBUTE: original, "__doc__": original.__doc__, "__module__": mixin.__module__}
    # By this name torch.jit.script looks for properties that it shall not compile.
    namespace[_UNSCRIPTED] = unscripted = list(getattr(original, _UNSCRIPTED, ()))
    if method != "forward":
        namespace |= {method: _either(mixin._mtlkernels_fused(method), original, method), "_mtlkernels_method": method}
    for base in mixin.__mro__[: mixin.__mro__.index(Converted)]:
        for name, fused in vars(base).items():
            if isinstance(fused, property):
                unscripted.append(name)
            elif inspect.isfunction(fused) and hasattr(original, name) and name not in namespace:
                namespace[name] = _either(fused, original, name)
    return _classes.setdefault(key, type(f"Fused{original.__name__}", (mixin, original), namespace))


def _either(fused: Callable[..., Any], original: type, name: str) -> Any:
    """The method of a converted class: the fused one, or the original's where a tracer can see nothing else.

    To whoever reads it, it is the original's: ``torch.jit.script`` compiles the source of what a function wraps, with
    the function's own globals, and ``torch.fx`` and ``torch.export`` take names of arguments from what it wraps.
    """
    unfused = getattr(original, name)
    needs_plain = _tracing.needs_plain

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if needs_plain(args, kwargs):
            return getattr(original, name)(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    if inspect.isfunction(unfused):
        method = types.FunctionType(method.__code__, unfused.__globals__, name, None, method.__closure__)
    return functools.wraps(unfused)(method)


def original_class(kind: type) -> type | None:
    """The class from which a converted class was made, None for any other."""
    original: type | None = getattr(kind, CLASS_ATTRIBUTE, None)
    return original
