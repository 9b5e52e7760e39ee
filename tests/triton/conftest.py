"""Makes Triton's interpreter quicker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from mtlkernels._backends import interpreting


@pytest.fixture(autouse=True, scope="session")
def _without_repetitions() -> Iterator[None]:
    """The interpreter puts its own functions in the place of Triton's language at every launch, and, which changes
    nothing any more, again at every call of a device function: that is a third of its time. It also makes the table of
    NumPy's dtypes again for each value, which is a twelfth.
    """
    if not interpreting():
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

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

    make = interpreter._get_np_dtype
    known: dict[Any, Any] = {}

    def numpy_dtype(of: Any) -> Any:
        element = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(element, tl.pointer_type):
            return make(of)
        if element not in known:
            known[element] = make(element)
        return known[element]

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch_anew),
        mock.patch.object(interpreter, "_get_np_dtype", numpy_dtype),
    ):
        yield
