"""Hooks on a model's modules and parameters, which look on or change what is computed; each call is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.fuzz.convert_subject import Edit, Subject


def _half(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t * 0.5 if t.is_floating_point() else t, value)


# By the method of a module that adds such a hook: what one returns that changes something, of what it is called with.
_OF_MODULES: dict[str, Callable[..., Any]] = {
    "register_forward_hook": lambda module, inputs, output: _half(output),
    "register_forward_pre_hook": lambda module, inputs: _half(inputs),
    "register_full_backward_hook": lambda module, inputs, outputs: _half(inputs),
    "register_full_backward_pre_hook": lambda module, outputs: _half(outputs),
    "register_state_dict_post_hook": lambda module, state, prefix, metadata: None,
}


def _on_module(method: str, changes: bool) -> Edit:
    def edit(subject: Subject) -> None:
        module = subject.module()
        calls, label = subject.calls, subject.label(module, method)

        def hook(*args: Any) -> Any:
            calls[label] += 1
            return _OF_MODULES[method](*args) if changes else None

        getattr(module, method)(hook)

    return edit


class Watcher:
    """A hook that is an object and keeps what it saw."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        self.shapes.append(type(output))


def _watch(subject: Subject) -> None:
    module = subject.module()
    module.watcher = Watcher()
    module.register_forward_hook(module.watcher)


def _on_parameter(method: str, changes: bool) -> Edit:
    def edit(subject: Subject) -> None:
        module, name = subject.parameter()
        calls, label = subject.calls, subject.label(module, f"{method} on {name}")

        def hook(tensor: Tensor) -> Tensor | None:
            calls[label] += 1
            return tensor * 0.5 if changes else None

        getattr(module._parameters[name], method)(hook)

    return edit


def _on_output(subject: Subject) -> None:
    """A hook that puts a hook on what a module returns."""

    def halve_gradient(module: Any, inputs: Any, output: Any) -> None:
        for leaf in torch.utils._pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda gradient: gradient * 0.5)

    subject.module().register_forward_hook(halve_gradient)


HOOKS: dict[str, Edit] = {
    "a gradient hook": _on_parameter("register_hook", False),
    "a gradient hook that changes": _on_parameter("register_hook", True),
    "a hook behind accumulation": _on_parameter("register_post_accumulate_grad_hook", False),
    "a hook on outputs' gradients": _on_output,
    "a hook that is an object": _watch,
}
for _method in _OF_MODULES:
    _words = _method.removeprefix("register_").replace("_", " ")
    HOOKS[_words] = _on_module(_method, False)
    if _method != "register_state_dict_post_hook":
        HOOKS[f"{_words} that changes"] = _on_module(_method, True)
