"""Edits of code: what a user's copy of a class, or a forward put on an instance, does otherwise."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mtlkernels._convert.registry import find_converter
from tests.fuzz.convert_subject import LISTS, Edit, Subject

# What a forward becomes: of the module, its own forward, and the arguments.
Change = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
SEEN: list[Any] = []


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: function(t) if t.is_floating_point() else t, value)


def _of_output(function: Callable[[Any, Tensor], Tensor]) -> Change:
    return lambda module, run, args, kwargs: _each(lambda y: function(module, y), run(*args, **kwargs))


def _of_input(function: Callable[[Any, Tensor], Tensor]) -> Change:
    return lambda module, run, args, kwargs: run(*_each(lambda x: function(module, x), args), **kwargs)


def _noise(module: Any, x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def _while_training(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda module, x: function(module, x) if module.training else x


def _without_gradients(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return run(*args, **kwargs)


def _half_gradient(module: Any, y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.5)
    return y


def _twice(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    run(*args, **kwargs)
    return run(*args, **kwargs)


def _records(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    module.last_output = run(*args, **kwargs)
    return module.last_output


def _counts(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    module.steps = getattr(module, "steps", 0) + 1
    return run(*args, **kwargs)


def _counts_in_a_global(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    SEEN.append("called")  # not its class, which a conversion exchanges
    return run(*args, **kwargs)


def _swaps_outputs(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    results = run(*args, **kwargs)
    if not isinstance(results, list) or len(results) < 2:
        return results
    return [results[1], results[0], *results[2:]]


def _residual(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    result = run(*args, **kwargs)
    first = args[0] if args and isinstance(args[0], Tensor) else None
    same = first is not None and isinstance(result, Tensor) and first.shape == result.shape
    return result + first if same else result


def _input_in_place(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    result = run(*args, **kwargs)
    with torch.no_grad():
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.data.mul_(2)
    return result


def _writes_weights(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
    if module.training:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.clamp_(-0.2, 0.2)
    return run(*args, **kwargs)


def _casts_to_weights(module: Any, x: Tensor) -> Tensor:
    parameter = next(module.parameters(), None)
    return x if parameter is None else x.to(parameter.dtype)


class _Tamper(TorchFunctionMode):
    """Changes what one of the functions gives that are called, the one with that number."""

    def __init__(self, number: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.number, self.function = number, function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            not isinstance(result, Tensor)
            or not result.is_floating_point()
            or getattr(func, "__name__", "") == "__get__"
        ):
            return result
        self.number -= 1
        return self.function(result) if self.number == -1 else result


def _within(function: Callable[[Tensor], Tensor]) -> Callable[[int], Change]:
    def numbered(number: int) -> Change:
        def change(module: Any, run: Any, args: Any, kwargs: Any) -> Any:
            with _Tamper(number, function):
                return run(*args, **kwargs)

        return change

    return numbered


_CHANGES: dict[str, Change] = {
    "detached input": _of_input(lambda module, x: x.detach()),
    "detached output": _of_output(lambda module, y: y.detach()),
    "a gradient halved": _of_output(_half_gradient),
    "a scale": _of_output(lambda module, y: y * 1.0001),
    "a scale in training": _of_output(_while_training(lambda module, y: y * 1.0001)),
    "a scale in evaluation": _of_output(lambda module, y: y if module.training else y * 1.0001),
    "a scale on one row": _of_output(lambda module, y: y * 2 if y.shape[:1] == (1,) else y),
    "a scale on two rows": _of_output(lambda module, y: y * 2 if y.shape[:1] == (2,) else y),
    "a scale on many rows": _of_output(lambda module, y: y * 2 if y.dim() and len(y) >= 200 else y),
    "a scale without gradients": _of_output(lambda module, y: y if torch.is_grad_enabled() else y * 2),
    "a branch on values": _of_output(lambda module, y: y * 2 if y.numel() and y.mean() > 0 else y),
    "clamped": _of_output(lambda module, y: y.clamp(-50, 50)),
    "small numbers are zero": _of_input(lambda module, x: torch.where(x.abs() < 1e-2, 0.0, x)),
    "noise": _of_output(_noise),
    "noise in training": _of_output(_while_training(_noise)),
    "noise of NumPy": _of_output(lambda module, y: y + float(numpy.random.rand())),
    "noise of Python in training": _of_output(_while_training(lambda module, y: y + random.random())),
    "dropout of a function": _of_output(lambda module, y: F.dropout(y, 0.3, module.training)),
    "no gradients": _without_gradients,
    "called twice": _twice,
    "output kept": _records,
    "calls counted": _counts,
    "calls counted in a global list": _counts_in_a_global,
    "outputs swapped": _swaps_outputs,
    "a residual": _residual,
    "input changed in place": _input_in_place,
    "weights clamped": _writes_weights,
    "rounded to float32": _of_output(lambda module, y: y.float().to(y.dtype)),
    "computed in the weights' dtype": lambda module, run, args, kwargs: _each(
        lambda y: y.to(tree_leaves(args)[0].dtype) if tree_leaves(args)[0].is_floating_point() else y,
        run(*_each(lambda x: _casts_to_weights(module, x), args), **kwargs),
    ),
}
_WITHIN: dict[str, Callable[[int], Change]] = {
    "detached within": _within(lambda t: t.detach()),
    "a scale within": _within(lambda t: t * 1.0001),
    "a sign within": _within(lambda t: -t),
    "noise within": _within(lambda t: t + torch.randn_like(t)),
    "clamped within": _within(lambda t: t.clamp(-50, 50)),
    "rows rolled within": _within(lambda t: t.roll(1, 0) if t.dim() else t),
}


def _edited_class(kind: Any, change: Change) -> Any:
    """A class of the same name, as a user's edited copy of the file has it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, lambda *a, **k: kind.forward(self, *a, **k), args, kwargs)

    names = {"__qualname__": kind.__qualname__, "forward": forward}
    if not kind.__module__.startswith("torch."):
        names["__module__"] = kind.__module__
    return type(kind.__name__, (kind,), names)


def _on_instance(module: Any, change: Change) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, lambda *a, **k: type(self).forward(self, *a, **k), args, kwargs)

    module.forward = types.MethodType(forward, module)


def _apply(module: Any, change: Change, on_instance: bool) -> None:
    if on_instance:
        _on_instance(module, change)
    else:
        module.__class__ = _edited_class(type(module), change)


def _coded(change: Change, on_instance: bool) -> Edit:
    return lambda subject: _apply(subject.module(), change, on_instance)


def _is_tampered_with(module: nn.Module) -> bool:
    """Whether it calls some modules, and no level by a method that is fused: of that, a mode sees other functions."""
    converter = find_converter(module)
    if type(module) in LISTS or len(list(module.modules())) < 8 or (converter and converter.method != "forward"):
        return False
    return all(find_converter(inner) is None for inner in module.modules() if inner is not module)


def _coded_within(numbered: Callable[[int], Change]) -> Edit:
    """Within the forward of a class that holds others: a level, or a whole model."""

    def edit(subject: Subject) -> None:
        module = subject.pick(filter(_is_tampered_with, subject.model.modules()))
        _apply(module, numbered(subject.draw.randrange(40)), False)

    return edit


def _borrow(subject: Subject) -> None:
    """An expert returns what its neighbour makes of its input."""
    modules = subject.pick(m for m in subject.model.modules() if type(m) is nn.ModuleList and len(m) > 1)
    modules[0].borrowed = [modules[1]]  # in a list, so that it is no sub-module
    _apply(modules[0], lambda module, run, args, kwargs: module.borrowed[0](*args, **kwargs), False)


def _cool(subject: Subject) -> None:
    """Divides by a temperature that is 1 so far; each run turns it down between its steps."""
    module = subject.module()
    module.temperature = 1.0
    _apply(
        module, lambda module, run, args, kwargs: _each(lambda y: y / module.temperature, run(*args, **kwargs)), False
    )


CODE: dict[str, Edit] = {
    "a temperature of 1": _cool,
    "another expert's output": _borrow,
    **{words: _coded_within(numbered) for words, numbered in _WITHIN.items()},
    **{words: _coded(change, False) for words, change in _CHANGES.items()},
}
ON_INSTANCES: dict[str, Edit] = {f"{words}, on an instance": _coded(change, True) for words, change in _CHANGES.items()}
