"""Makes Triton's interpreter quicker, and watches what it launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from mtlkernels._backends import interpreting


@pytest.fixture(autouse=True, scope="session")
def _without_repetitions() -> Iterator[None]:
    """The interpreter does again and again what it has done before; half of its time goes there.

    It puts its own functions in the place of Triton's language at every launch, and, which changes nothing any more,
    again at every call of a device function. It makes the table of NumPy's dtypes again for each value, and for each
    tensor a type and a shape like those of many others. And it computes each sum and product of int32 once more in
    int64, to see whether it overflows: not with sizes as small as these.
    """
    if not interpreting():
        yield
        return
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])  # of so many objects few are garbage
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    unchecked = replace(builder.options, sanitize_overflow=False)
    with ExitStack() as patches:
        for of, name, new in (
            (builder, "options", unchecked),
            *_patched_once(interpreter),
            (interpreter, "_get_np_dtype", _numpy_dtype(interpreter, tl)),
            *_types_once(tl),
        ):
            patches.enter_context(mock.patch.object(of, name, new))
        yield
    gc.set_threshold(*before)


@pytest.fixture(autouse=True, scope="session")
def _checked_launches(_without_repetitions: None) -> Iterator[None]:
    """Every launch is checked for accesses out of bounds and for races."""
    if not interpreting():
        yield
        return
    from tests.triton.checker import checked

    with checked():
        yield


def _patched_once(interpreter: Any) -> list[tuple[Any, str, Any]]:
    """The language is patched at a launch for each device function that it calls, and not again."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[Any] = set()

    def patch_once(function: Any) -> Any:
        if function in patched:
            return None
        patched.add(function)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    return [(interpreter, "_patch_lang", patch_once), (interpreter.GridExecutor, "__call__", launch_anew)]


def _numpy_dtype(interpreter: Any, tl: Any) -> Callable[[Any], Any]:
    make = interpreter._get_np_dtype
    known: dict[Any, Any] = {}

    def numpy_dtype(of: Any) -> Any:
        element = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(element, tl.pointer_type):
            return make(of)
        if element not in known:
            known[element] = make(element)
        return known[element]

    return numpy_dtype


def _types_once(tl: Any) -> list[tuple[Any, str, Any]]:
    """What a type of a block, and a tensor of a type, hold beside what is its own."""
    of_block, of_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            of_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        else:
            vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            of_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        else:
            vars(self).update(tensors[type.name], handle=handle, type=type)

    return [(tl.core.block_type, "__init__", block), (tl.core.tensor, "__init__", tensor)]
