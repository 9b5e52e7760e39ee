"""Whether several passes gain where each level runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtlkernels import _graph, _torch
from mtlkernels.ops.level import autograd
from mtlkernels.ops.level.checkpointed import is_checkpointed
from mtlkernels.ops.level.node import level_of

# On a CPU each pass but one is saved what does not depend on the loss, such as to bring weights into the form that
# kernels want; to cut the graph takes longer than that where rows are fewer than SHARED_ROWS, or the weights of the
# level that a loss meets first, once for each pass that is saved them, fewer than SHARED_WEIGHTS. Measured on an Intel
# Xeon with AMX, one thread, with trunks of one and of two levels of 3 to 17 experts (8) to (256, 128), 2 to 8 losses
# and 16 to 1,024 rows: passes that share took 0.79 to 1.02 times as long from there on, and up to 1.7 times below.
SHARED_ROWS, SHARED_WEIGHTS = 64, 1 << 19


def pays(losses: Sequence[Tensor], passes: int) -> bool:
    """Of so many passes from these losses; what else stands against it :func:`~.passes.cut` finds."""
    level = _graph.first_level(losses, autograd.Level)
    if level is None:
        return False
    plan = level_of(level).plan
    (rows, *_), device = _torch.shape_of_gradient(level, 0)
    if device.type != "cpu" or plan.backend == "triton" or is_checkpointed(level):
        return True  # launches are shared, and what is computed again
    if rows < SHARED_ROWS:
        return False
    spec = plan.spec
    edges = level.next_functions[spec.num_inputs :][: len(spec.expert_inputs) * len(spec.layers)]
    shapes = [_torch.shape_of_gradient(*edge)[0] for edge in edges if edge[0] is not None]
    return sum(shape[0] * shape[1] for shape in shapes) * (passes - 1) >= SHARED_WEIGHTS
