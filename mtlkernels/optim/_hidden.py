"""Parameters that a loss depends on though its graph does not show them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtlkernels import _torch


def refuse_hidden(losses: Sequence[Tensor]) -> None:
    """For losses that leave parameters without gradients; their graphs may have been freed.

    Raises:
        RuntimeError: what :func:`torch.autograd.grad` cannot see stands in their graphs, so that such parameters would
            silently not be trained.
    """
    stack = [loss.grad_fn for loss in losses]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if _torch.is_reentrant_checkpoint(node):
            raise RuntimeError(
                "losses depend on parameters within torch.utils.checkpoint(use_reentrant=True), which only"
                " loss.backward() reaches: call it with use_reentrant=False"
            )
        if _torch.is_leaf_node(node) and _torch.is_flat_parameter(node.variable):  # type: ignore[attr-defined]
            raise RuntimeError(
                "losses depend on parameters that FullyShardedDataParallel has put together, which only"
                " loss.backward() reaches: shard the model by torch.distributed.fsdp.fully_shard"
            )
        below = {other for other, _ in node.next_functions} - seen
        seen |= below
        stack += below
