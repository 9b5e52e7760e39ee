"""Lists of gradients that C++ reads at once."""

from __future__ import annotations

import pytest
import torch

from mtlkernels import _extension

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


def test_lists_of_gradients_that_want_one() -> None:
    """They are read unless somebody records, as after ``create_graph=True`` in ``no_grad``."""
    lists = _extension.function("gradient_lists")
    grads = [torch.randn(5, requires_grad=True) for _ in range(4)]
    assert lists(grads, 2) is None
    with torch.no_grad():
        assert lists(grads, 2) is not None
