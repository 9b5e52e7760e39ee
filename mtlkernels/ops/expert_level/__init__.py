"""Expert level: a level of experts whose gates are linear layers of the inputs, experts and gates in one operator.

The public function is :func:`mtlkernels.expert_mixture`, which comes here for ``gate_weights``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._autograd import apply
from mtlkernels.ops._call import needs_function, run_forward
from mtlkernels.ops.expert_level.autograd import ExpertLevel, Plan

_OP = "expert_level"
Biases = Sequence[Tensor | None]


def expert_level(
    streams: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Biases,
    gate_weights: Sequence[Tensor],
    gate_biases: Biases,
    flat: Any,
    unused: Sequence[Tensor],
    direct: bool = False,
) -> tuple[Tensor, ...]:
    """The level's outputs, of checked arguments in the operators' form.

    Args:
        flat: streams of the experts, experts and sizes of the gates, and activations.
        unused: parameters of experts that no gate mixes, whose gradients are zero.
        direct: straight to the C++ operator, which checks what it is given; where a gradient is wanted.
    """
    backend = _backends.forced()
    groups = (streams, weights, biases, gate_weights, gate_biases)
    if direct or needs_function(*groups, unused):
        plan = Plan.of(len(streams), backend, flat, direct)
        out = apply(ExpertLevel, plan, *(tensor for group in groups for tensor in group), *unused)
        return tuple(out[: len(gate_weights)])
    outputs, _, _ = run_forward(_OP, backend, streams[0], *groups, *flat, False)
    return tuple(outputs)
