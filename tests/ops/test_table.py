"""How a call's table reaches a GPU, of which there need not be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtlkernels.ops import _table
from mtlkernels.ops._table import Table, moved

GPU = torch.device("cuda", 0)


class Host:
    """A tensor that notes how it is made and copied."""

    made: list[tuple[int, bool]] = []

    def __init__(self, entries: list[int], dtype: torch.dtype, device: str, pin_memory: bool) -> None:
        assert device == "cpu"
        Host.made.append((len(entries), pin_memory))

    def to(self, device: torch.device, non_blocking: bool = False) -> tuple[torch.device, bool]:
        return device, non_blocking

    is_cpu, device = True, torch.device("cpu")

    def pin_memory(self) -> Host:
        return Host([0], torch.int64, "cpu", True)


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("count", [3, 10_000])
def test_copies_come_from_pinned_memory(
    count: int, keeps: bool, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are kept only where a graph reads them again, and PyTorch does not see to that."""
    kept: list[Any] = []
    monkeypatch.setattr(torch, "tensor", Host)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_table, "GRAPHS_KEEP_PINNED", keeps)
    monkeypatch.setattr(_table, "_captured", kept)
    monkeypatch.setattr(Host, "made", [])
    table = Table()
    table.integers(range(count))
    assert table.to(GPU) == (GPU, True)  # type: ignore[comparison-overlap]
    assert Host.made == [(count, True)]
    assert len(kept) == (capturing and not keeps)
    order: Any = Host([0], torch.int64, "cpu", False)
    assert moved(order, GPU) == (GPU, True)  # type: ignore[comparison-overlap]
    assert moved(order, torch.device("cpu")) is order
    assert Host.made[1:] == [(1, False), (1, True)]
    assert len(kept) == 2 * (capturing and not keeps)
