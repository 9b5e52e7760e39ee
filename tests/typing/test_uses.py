"""The uses whose types are checked do run, and give what their types say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.typing import uses


@pytest.mark.parametrize(
    "use",
    [uses.ops, uses.lists_of_modules, uses.gradients, uses.modules, uses.training, uses.serving, uses.install],
    ids=lambda use: use.__name__,
)
def test_uses(use: Callable[[], None]) -> None:
    use()
