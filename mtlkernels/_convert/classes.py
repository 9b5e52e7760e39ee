"""How a module changes its behaviour in place: it gets a subclass of its own class.

A method bound on the instance would follow it into ``copy.deepcopy`` still bound to the old instance, and would not
pickle. A subclass, as ``torch.nn.utils.parametrize`` and FSDP2 make them, leaves the instance as it is.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import inspect
import types
import weakref
from typing import Any

from mtlkernels import _tracing
from mtlkernels._convert.arguments import Parameters
from mtlkernels.ops._checks import refuse_training

CLASS_ATTRIBUTE = "_mtlkernels_original"
PLAN = "_mtlkernels_plan"
# Of an instance: the classes of all of its parts when it was converted.
CLASSES = "_mtlkernels_classes"
# Of an instance: its own code runs under autocast.
OWN_UNDER_AUTOCAST = "_mtlkernels_own_under_autocast"
# Of an instance in a copy that ``mtlkernels.prepare`` has made: a call in training mode is refused.
SERVES_ONLY = "_mtlkernels_serves_only"
# How many modules each of its lists had then, see ``levels.lengths``.
LENGTHS = "_mtlkernels_lengths"
# Of each of its levels then: which gates had a softmax of their own.
SOFTMAXES = "_mtlkernels_softmaxes"
# What its code read then beside tensors and parts, see ``watched.py``.
WATCHED = "_mtlkernels_watched"
# With which arguments its method was tried then, see ``arguments.py``.
TRIED = "_mtlkernels_tried"
_UNSCRIPTED = "__jit_unused_properties__"


class Fused:
    """Base of converted classes; an instance's plan is a Routing for each level, None for one that is left alone."""

    # torch.jit.script reads annotations of what an instance has, so the plan has none.
    _mtlkernels_original: type
    _mtlkernels_trunk: Any  # the description, None where it is gone
    _mtlkernels_plan = None  # of an instance that was made of the converted class, and is none of a converted model
    _mtlkernels_force = False
    _mtlkernels_key: tuple[Any, ...]
    _mtlkernels_parameters: Parameters | None  # of its method

    def __init_subclass__(cls, **options: Any) -> None:
        """Not that of the class that is converted, whose own subclasses may be listed somewhere."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies by what the class is made of: it has no name to import it by."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        kind = type(self)
        if CLASS_ATTRIBUTE not in vars(kind):
            return reduced
        of_new = reduced[1][1:] if reduced[0] is copyreg.__newobj__ else ()  # type: ignore[attr-defined]
        return (_rebuild, (*kind._mtlkernels_key, *of_new), *reduced[2:])


def _rebuild(base: type[Fused], original: type, method: str, source: str, *of_new: Any) -> Any:
    kind = converted_class(base, original, method, source)
    return kind.__new__(kind, *of_new)


def description_of(source: str) -> Any:
    """What ``DESCRIPTIONS`` of a file here has for a class; "file.class" says which."""
    file, name = source.split(".")
    return importlib.import_module(f"mtlkernels._convert.{file}").DESCRIPTIONS[name]


# By the class that they were made of, as long as something is of them: it may be defined for one model, and leads to
# all around its methods.
_classes: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Any, Any]] = weakref.WeakKeyDictionary()


def converted_class(base: type[Fused], original: type, method: str, source: str) -> Any:
    """The subclass of ``original`` with that method fused as ``source`` describes it, always the same one.

    ``base`` finds the description where there is no source.
    """
    key = (base, original, method, source)
    made = _classes.get(original) or _classes.setdefault(original, weakref.WeakValueDictionary())
    known = made.get((base, method, source))
    if known is not None:
        return known
    namespace: dict[str, Any] = {
        CLASS_ATTRIBUTE: original,
        "_mtlkernels_key": key,
        "_mtlkernels_parameters": Parameters.of(getattr(original, method)),
        "__doc__": original.__doc__,
        "__module__": base.__module__,
        # By this name torch.jit.script looks for properties that it shall not compile.
        _UNSCRIPTED: [*getattr(original, _UNSCRIPTED, ()), "_mtlkernels_trunk"],
        method: _fused(original, method),
    }
    if source:
        namespace["_mtlkernels_trunk"] = description_of(source)
    kind = type(f"Fused{original.__name__}", (base, original, *_mixed_in(original)), namespace)
    return made.setdefault((base, method, source), kind)


def _mixed_in(original: type) -> list[type]:
    """Its own bases, for code that looks for one among a class's bases alone, as LibMTL's weightings do."""
    return [base for base in original.__bases__ if base is not object and base.__module__ != "typing"]


def _fused(original: type, name: str) -> Any:
    """The method of a converted class: fused, or the original's where that has to run or a tracer sees nothing else.

    To whoever reads it, it is the original's: ``torch.jit.script`` compiles the source of what a function wraps, with
    the function's own globals, and ``torch.fx`` and ``torch.export`` take names of arguments from what it wraps.
    """
    unfused = getattr(original, name)
    # By names of its own, as its globals are going to be the original's.
    needs_plain, serves_only, refuse = _tracing.needs_plain, SERVES_ONLY, refuse_training

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and serves_only in self.__dict__:
            refuse()
        own = getattr(original, name)
        # A method that was exchanged since is not the one that was tried.
        if own is unfused and not needs_plain(args, kwargs):
            trunk, plan = self._mtlkernels_trunk, self._mtlkernels_plan
            # A class that was registered again may have got another method.
            if trunk is not None and plan is not None and trunk.method == name:
                result = trunk.call(self, plan, args, kwargs)
                if result is not None:
                    return result[0]
        return own(self, *args, **kwargs)

    if inspect.isfunction(unfused):
        method = types.FunctionType(method.__code__, unfused.__globals__, name, None, method.__closure__)
    return functools.wraps(unfused)(method)


def original_class(kind: type) -> type | None:
    """The class from which a converted class was made, None for any other."""
    original: type | None = getattr(kind, CLASS_ATTRIBUTE, None)
    return original


def is_torchs(kind: type) -> bool:
    """Whether a class is PyTorch's own, or one that PyTorch makes, as of FSDP: such are read as they are."""
    return kind.__module__.partition(".")[0] == "torch"
