"""The order of projections is known here."""

from __future__ import annotations

from typing import Any

import pytest

from mtlkernels.optim import pcgrad as module
from tests.optim.model import ORDER, TASKS


@pytest.fixture(autouse=True)
def _known_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections in a known order, so that the definition can follow."""
    draw = module.draw_order

    def known(order: Any, generator: Any, num_tasks: int, *rest: Any, **options: Any) -> Any:
        return draw(ORDER if num_tasks == TASKS else order, None, num_tasks, *rest, **options)

    monkeypatch.setattr(module, "draw_order", known)
