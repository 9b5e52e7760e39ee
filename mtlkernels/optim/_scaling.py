"""Losses that a gradient scaler scales; and its scale, which the ranks of a group must have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def scaled(losses: list[Tensor], scaler: Any) -> tuple[list[Tensor], Tensor | None]:
    """The losses times the scale, and the scale, a scalar; None where no scaler is given, or one that is off."""
    if scaler is not None and not isinstance(scaler, torch.amp.grad_scaler.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    if scaler is None or not scaler.is_enabled():
        return losses, None
    with torch.enable_grad():
        losses = [scaler.scale(loss) for loss in losses]
    return losses, scaler.scale(torch.ones((), device=losses[0].device))


def is_readable(scale: Tensor) -> bool:
    """Whether the scale can be looked at without waiting: on a CPU."""
    return scale.is_cpu


def scale_facts(scale: Tensor | None) -> dict[str, Any]:
    """What of the scale ranks compare before they exchange gradients."""
    read = None if scale is None or not is_readable(scale) else scale.item()
    return {"whether a scaler is on": scale is not None, "the scale of scaler": read}


def scales_differ(group: ProcessGroup | None, scale: Tensor | None) -> Tensor | None:
    """Whether ranks of the group have other scales, the same answer on all of them; nothing waits for it on a GPU.

    None where it is known that they do not: there is one rank, or no scale, or :func:`scale_facts` had it.
    """
    if group is None or group.size() == 1 or scale is None or is_readable(scale):
        return None
    from mtlkernels.ops.pcgrad.distributed.collectives import all_gather

    scales = all_gather(scale.reshape(1), group)()
    return (scales != scales[0]).any()


def nan_where(differ: Tensor | None, numbers: Tensor) -> Tensor:
    """The numbers, or NaN in their place, by which every rank's scaler skips the step."""
    return numbers if differ is None else torch.where(differ.to(numbers.device), torch.nan, numbers)


def plain(differ: Tensor | None, device: torch.device) -> Tensor:
    """The coefficient [1] of gradients that are the sums to write already."""
    return nan_where(differ, torch.ones(1, dtype=torch.float64, device=device))
