"""Calls of a trunk's level that serve on a CPU: what was read of its modules is kept from one to the next.

Reading a dozen experts' parameters and laying out tables for the kernels takes as long as half a level of one row. C++
does it once, and at each call compares all that it has read with what the modules hold then: the same parameters, where
they were, with the same shapes and strides. So a parameter that was replaced or moved is never met by what was read
before; what was written to one is seen, as values are read where they are.

Nothing is read for the first call in a row, which may be the only one; and where modules keep changing, as under
``torch.func.functional_call``, less and less often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from mtlkernels import _decisions, _extension
from mtlkernels.ops._call import direct_to_cpp
from mtlkernels.ops.level.direct import note_direct

if TYPE_CHECKING:
    from mtlkernels.nn.level import TrunkLevel

_MOST_CALLS_TO_WAIT = 1024


def refuse_training() -> NoReturn:
    """For a level, or a model, that serves only."""
    raise RuntimeError(
        "a copy that mtlkernels.prepare has made serves only, got a call in training mode: call eval(), or train the"
        " model that it was made of"
    )


class KeptCalls:
    """Those of one level.

    Args:
        serves_only: it is of a copy that :func:`mtlkernels.prepare` has made, and refuses to train.
    """

    def __init__(self, serves_only: bool = False) -> None:
        self._serves_only = serves_only
        self._kept: Any = None
        self._wait = 1  # calls, before the level is read again
        self._waited = 0

    def __reduce__(self) -> Any:
        """A copy of a level keeps nothing of it."""
        return KeptCalls, (self._serves_only,)

    def serve(self, level: TrunkLevel, inputs: Any) -> tuple[Tensor, ...] | None:
        """The level's outputs, or None: this call goes the usual way."""
        if self._serves_only:
            if level.training:
                refuse_training()
        elif torch.is_grad_enabled():
            return None
        several = isinstance(inputs, (list, tuple))
        if not direct_to_cpp(inputs[0] if several and inputs else inputs):
            return None
        found = False if self._kept is None else self._kept.serve(level, inputs)
        if type(found) is tuple:
            if _decisions.on:
                note_direct(inputs)
            return found
        if found is False:
            self._read(level, len(inputs) if several else 1)
        return None

    def _read(self, level: TrunkLevel, num_inputs: int) -> None:
        """Reads the level, if enough calls have passed since that was in vain."""
        if self._kept is not None:
            self._kept = None
            self._wait = min(2 * self._wait, _MOST_CALLS_TO_WAIT)
        if self._waited < self._wait:
            self._waited += 1
            return
        self._waited = 0
        if _extension.has_module():
            self._kept = level.read_for_serving(num_inputs)
        if self._kept is None:
            self._wait = min(2 * self._wait, _MOST_CALLS_TO_WAIT)
