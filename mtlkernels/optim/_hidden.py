"""What stands in losses' graphs that only ``loss.backward()`` serves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtlkernels import _graph, _torch


def refuse_hidden(losses: Sequence[Tensor]) -> None:
    """Walks all of the losses' graph: a parameter that is hidden in one place may be seen in another.

    Raises:
        RuntimeError: what only ``loss.backward()`` goes into stands in it, so that parameters would silently not be
            trained, or not by all losses; or what takes its first backward pass for one that it reduces.
    """
    made, flat = _graph.notable_nodes(losses, _torch.IS_FLAT)
    if any(map(_torch.is_flat_parameter, flat)):
        raise RuntimeError(
            "losses depend on parameters that FullyShardedDataParallel has put together, which only"
            " loss.backward() reaches: shard the model by torch.distributed.fsdp.fully_shard"
        )
    for node in made:
        if _torch.is_reentrant_checkpoint(node):
            raise RuntimeError(
                "losses depend on parameters within torch.utils.checkpoint(use_reentrant=True), which only"
                " loss.backward() reaches: call it with use_reentrant=False"
            )
        if _torch.waits_for_backward(node):
            raise RuntimeError(
                "losses come from DistributedDataParallel with static_graph=True, which would take this call for its"
                " first loss.backward(), and not reduce the gradients of any later one: leave static_graph out, or call"
                " loss.backward() once before"
            )
