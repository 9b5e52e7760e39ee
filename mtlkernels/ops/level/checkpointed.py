"""Levels within ``torch.utils.checkpoint``: each pass that reads what was saved there computes all of it again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mtlkernels.ops.level.node import level_of
from mtlkernels.ops.level.spec import BATCH_NORM

# Of a node's metadata.
_KEY = "mtlkernels.checkpointed"
_DEEPEST = 8


class Within(NamedTuple):
    """The checkpoint around a call: what PyTorch keeps of it, and how many tensors have been saved there before."""

    frame: Any
    before: int

    @classmethod
    def of(cls, frame: Any) -> Within:
        return cls(frame, len(frame.weak_holders))

    def note(self, outputs: Sequence[Tensor]) -> None:
        """That the level behind these outputs is in the checkpoint, and how many tensors were saved for it."""
        node: Any = outputs[0].grad_fn if outputs else None
        for _ in range(_DEEPEST):  # a cast may lie between
            if node is None:
                return
            if level_of(node) is not None:
                saved = len(self.frame.weak_holders) - self.before
                node.metadata[_KEY] = weakref.ref(self.frame), saved  # which holds the checkpoint's inputs
                return
            node = node.next_functions[0][0] if node.next_functions else None


def is_checkpointed(level: Any) -> bool:
    """Whether a level's node is in a checkpoint."""
    return _KEY in level.metadata


def recomputes_more(levels: Sequence[Any], losses: int) -> bool:
    """Whether passes that share these levels' nodes would compute checkpoints again more often than a pass a loss.

    They go from the losses to the levels and on from there, and whatever else lies in a checkpoint has each of them
    compute it. By levels alone it is computed once for each, but a batch norm would see the batch another number of
    times than in modules.
    """
    by_frame: dict[Any, list[int]] = {}
    for level in levels:
        reference, saved = level.metadata.get(_KEY, (None, 0))
        frame = None if reference is None else reference()
        if frame is None:
            continue
        if any(layer.norm == BATCH_NORM for layer in level_of(level).plan.spec.layers):
            return True
        by_frame.setdefault(frame, []).append(saved)
    return any(len(own) > losses or sum(own) < len(frame.weak_holders) for frame, own in by_frame.items())
