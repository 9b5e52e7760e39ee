"""Levels within ``torch.utils.checkpoint``: each pass that reads what was saved there computes all of it again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels import _torch
from mtlkernels.ops.level.node import level_of
from mtlkernels.ops.level.spec import BATCH_NORM

# Of a node's metadata: what PyTorch keeps of each checkpoint around it, the innermost first.
_KEY = "mtlkernels.checkpointed"
_DEEPEST = 8


def note(outputs: Sequence[Tensor]) -> None:
    """That the level behind these outputs was called in the checkpoints around, if there are any."""
    frames = _torch.checkpoints_around()
    node: Any = outputs[0].grad_fn if any(frame is not None for frame in frames) else None
    for _ in range(_DEEPEST):  # a cast may lie between
        if node is None:
            return
        if level_of(node) is not None:
            # Weakly, as they hold what goes into them.
            node.metadata[_KEY] = [weakref.ref(frame) if frame is not None else None for frame in frames]
            return
        node = node.next_functions[0][0] if node.next_functions else None


def is_checkpointed(level: Any) -> bool:
    """Whether a level's node is in a checkpoint."""
    return _KEY in level.metadata


def recomputes_more(levels: Sequence[Any], passes: int) -> bool:
    """Whether passes that share these levels' nodes would compute checkpoints again more often than each by itself.

    They go from the losses to the levels and on from there, and whatever else lies in a checkpoint has each of them
    compute it. By levels alone it is computed once for each, but a batch norm would see the batch another number of
    times than in modules.
    """
    by_frame: dict[Any, list[int]] = {}
    for level in filter(is_checkpointed, levels):
        references = level.metadata[_KEY]
        if len(references) > 1 or any(layer.norm == BATCH_NORM for layer in level_of(level).plan.spec.layers):
            return True
        frame = references[0]()
        if frame is not None:  # whose tensors have not been given up yet
            by_frame.setdefault(frame, []).append(_saved_for(level))
    return any(len(own) > passes or sum(own) < len(frame.weak_holders) for frame, own in by_frame.items())


def _saved_for(level: Any) -> int:
    """How many tensors were saved for a level's node: all that it was applied to, and what its forward pass saved."""
    known = level_of(level)
    # A node in C++ has no edge for the seed.
    seed = known is not level and any(layer.dropout > 0 for layer in known.plan.spec.layers)
    return len(level.next_functions) + int(known.num_saved) + seed
