"""Levels within ``torch.utils.checkpoint``: each pass that reads what was saved there computes all of it again."""

from __future__ import annotations

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
                node.metadata[_KEY] = self.frame, len(self.frame.weak_holders) - self.before
                return
            node = node.next_functions[0][0] if node.next_functions else None


def recomputes_more(levels: Sequence[Any], losses: int) -> bool:
    """Whether passes that share these levels' nodes would compute checkpoints again more often than a pass a loss.

    They go from the losses to the levels and on from there, and whatever else lies in a checkpoint has each of them
    compute it. By levels alone it is computed once for each, but a batch norm would see the batch another number of
    times than in modules.
    """
    saved: dict[int, list[tuple[Any, int]]] = {}
    for level in levels:
        found = level.metadata.get(_KEY)
        if found is None:
            continue
        if any(layer.norm == BATCH_NORM for layer in level_of(level).plan.spec.layers):
            return True
        saved.setdefault(id(found[0]), []).append(found)
    return any(
        len(own) > losses or sum(count for _, count in own) < len(own[0][0].weak_holders) for own in saved.values()
    )
