"""Makes Triton's interpreter quicker, and watches what it launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from mtlkernels._backends import interpreting


@pytest.fixture(autouse=True, scope="session")
def _without_repetitions() -> Iterator[None]:
    """The interpreter does again and again what it has done before; half of its time goes there.

    It puts its own functions in the place of Triton's language at every launch and every call of a device function. It
    makes the table of NumPy's dtypes again for each value, and for each tensor a type and a shape like those of many
    others. It broadcasts and casts what is equal already. And it computes each sum and product of int32 once more in
    int64, to see whether it overflows: not with sizes as small as these. Each function of the language asks whether a
    kernel calls it, as the interpreter always does, and looks for constants in each value that it is given.
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
            *_semantics(type(interpreter.interpreter_semantic)),
            (interpreter, "_get_np_dtype", _numpy_dtype(interpreter, tl)),
            *_types_once(tl),
            (tl.core, "_unwrap_if_constexpr", _unwrapped(tl)),
            (interpreter, "_patch_attr", _patched_member(interpreter)),
        ):
            patches.enter_context(mock.patch.object(of, name, new))
        patches.enter_context(_patched_for_good(interpreter))
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


class _Restored:
    """What the interpreter is to put back after a launch: nothing."""

    def restore(self) -> None:
        pass


@contextmanager
def _patched_for_good(interpreter: Any) -> Iterator[None]:
    """The language is patched for each function that it is used by, and put back at the end."""
    patch, scopes = interpreter._patch_lang, dict[Any, Any]()

    def patch_once(function: Any) -> _Restored:
        if function not in scopes:
            scopes[function] = patch(function)
        return _Restored()

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


def _semantics(of: Any) -> list[tuple[Any, str, Any]]:
    """Of two operands: of equal shapes and types there is nothing to broadcast or to cast, and promotion is known."""
    broadcast, cast, promote = of.broadcast_impl_value, of.cast, of.computation_type_impl
    promoted: dict[Any, Any] = {}

    def broadcast_unequal(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        blocks = left.is_block(), right.is_block()
        if blocks == (False, False) or (blocks == (True, True) and left.shape == right.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_unequal(self: Any, value: Any, to: Any, *rest: Any) -> Any:
        return value if value.dtype.name == to.scalar.name else cast(self, value, to, *rest)

    def promote_once(self: Any, *operands: Any) -> Any:
        key = tuple(getattr(operand, "name", operand) for operand in operands)
        if key not in promoted:
            promoted[key] = promote(self, *operands)
        return promoted[key]

    return [
        (of, "broadcast_impl_value", broadcast_unequal),
        (of, "cast", cast_unequal),
        (of, "computation_type_impl", promote_once),
    ]


def _unwrapped(tl: Any) -> Callable[[Any], Any]:
    """Nearly all values are neither a constant nor a list."""
    unwrap, constant = tl.core._unwrap_if_constexpr, tl.core.constexpr
    others = (list, tuple, tl.core.tuple, constant)

    def unwrapped(value: Any) -> Any:
        if type(value) is constant:
            return value.value
        return unwrap(value) if isinstance(value, others) else value

    return unwrapped


def _patched_member(interpreter: Any) -> Callable[..., None]:
    """A function of the language is called past what asks whether a kernel calls it."""
    semantic = interpreter.interpreter_semantic

    def patch(of: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = getattr(member, "__wrapped__", member)

        def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            return inner(*args, _semantic=semantic, **kwargs)

        scope.set_attr(of, name, call)

    return patch


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
