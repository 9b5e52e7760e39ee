"""The order of projections is known here, and small levels are shared by losses as large ones are."""

from __future__ import annotations

from typing import Any

import pytest

from mtlkernels.ops.level import sharing
from mtlkernels.optim import pcgrad as module
from tests.optim.model import ORDER, TASKS


@pytest.fixture(autouse=True)
def _known_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections in a known order, so that the definition can follow."""
    draw = module.draw_order

    def known(order: Any, generator: Any, num_tasks: int, *rest: Any, **options: Any) -> Any:
        return draw(ORDER if num_tasks == TASKS else order, None, num_tasks, *rest, **options)

    monkeypatch.setattr(module, "draw_order", known)


@pytest.fixture(autouse=True)
def _no_level_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SHARED_ROWS", 0)
    monkeypatch.setattr(sharing, "SHARED_WEIGHTS", 0)
