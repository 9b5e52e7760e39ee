"""How a call's table reaches a GPU, of which there need not be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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

    def is_pinned(self) -> bool:
        return False

    def contiguous(self) -> Host:
        return self


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


def pinned_as_pytorch_does(tensor: Tensor) -> Tensor:
    """By ``Tensor.pin_memory`` of PyTorch 2.10 to 2.15: memory of the same strides, unless it is pinned."""
    return tensor if tensor.is_pinned() else torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is copied to a device is memory that it reads later; those in the list are pinned."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: any(self is other for other in pinned))
    monkeypatch.setattr(Tensor, "pin_memory", pinned_as_pytorch_does)
    monkeypatch.setattr(_table, "copied", lambda tensor, device: tensor)
    return pinned


@pytest.mark.parametrize("is_pinned", [False, True])
def test_what_the_caller_keeps_may_be_written_to(is_pinned: bool, on_gpu: list[Tensor]) -> None:
    """At once, for the next step, though the device may not have read it yet."""
    order = torch.tensor([[1.0, 0.0]])
    on_gpu += [order] * is_pinned
    read = moved(order, GPU)
    order.fill_(7.0)
    assert read.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("is_pinned", [False, True])
def test_one_order_for_all_tasks_reaches_the_device(is_pinned: bool, on_gpu: list[Tensor]) -> None:
    """As a row that is expanded, or that is cut out of a larger matrix."""
    for order in (torch.tensor([2.0, 0.0, 1.0]).expand(3, 3), torch.arange(18.0).view(3, 6)[:, ::2]):
        on_gpu += [order] * is_pinned
        read = moved(order, GPU)
        assert torch.equal(read, order) and read.is_contiguous()
