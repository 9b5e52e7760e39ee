"""Makes Triton's interpreter quicker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from mtlkernels._backends import interpreting


@pytest.fixture(autouse=True, scope="session")
def _patch_the_language_once_a_launch() -> Iterator[None]:
    """The interpreter puts its own functions in the place of Triton's language at every launch, and, which changes
    nothing any more, again at every call of a device function: that is a third of its time.
    """
    if not interpreting():
        yield
        return
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

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch_anew),
    ):
        yield
