"""Gradients that FSDP2 would keep to itself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mtlkernels import _torch


def refuse_unreduced(parameters: Iterable[Tensor]) -> None:
    """Asks before the first backward pass: what FSDP keeps, it adds to a later pass, as if it were one task's.

    Raises:
        RuntimeError: FSDP is told not to reduce these parameters' gradients, or holds some of an earlier pass.
    """
    trained = {id(parameter) for parameter in parameters}
    for unit in _torch.fsdp_units():
        if not trained.intersection(map(id, unit.parameters)):
            continue
        if not unit.reduces:
            raise RuntimeError(
                "FSDP must reduce the gradients of every backward pass, which set_requires_gradient_sync(False) or"
                " set_requires_all_reduce(False) has turned off: set them to True"
            )
        if unit.holds:
            raise RuntimeError(
                "FSDP must hold no gradients of earlier backward passes, got some that were not reduced, as those of"
                " loss.backward() under set_requires_gradient_sync(False) are: the next task's gradient would contain"
                " them. A loss.backward() that reduces adds them to .grad, which zero_grad() clears"
            )
