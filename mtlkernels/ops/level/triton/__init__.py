"""A level on NVIDIA GPUs.

A chain takes one launch a layer forward, the last of which mixes as well (or one more launch does, where there are many
gates); backward one launch for the mixture, one a layer for the gradient of its inputs, and one for all weights and
biases. Linear gates are further programs of these launches. Layerwise levels take further launches for statistics, for
what the last layer gives, and for the gradients of norms and slopes.
Parameters, inputs and gradients are read and written where they are; only hidden layers, [E, B, H] each, are scratch.
Of what the forward pass saved, the backward pass of a part of a level reads what belongs to its experts where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mtlkernels.ops.level.reference import Asked, asked_for
from mtlkernels.ops.level.spec import LevelSpec
from mtlkernels.ops.level.triton import chain_backward, chain_forward, layerwise_backward, layerwise_forward
from mtlkernels.ops.level.triton.operands import check_level, check_saved


def forward(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    spec: Sequence[int],
    numbers: Sequence[float],
    seed: Tensor | None,
    save: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """As the reference."""
    level = LevelSpec.decoded(spec, numbers)
    groups = check_level(level, (*inputs, *parameters, *gates), seed)
    if level.stores_inputs:
        return layerwise_forward.forward(level, groups, seed, save)
    return chain_forward.forward(level, groups, save)


def backward(
    grad_outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    spec: Sequence[int],
    numbers: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As the reference."""
    tensors, level = (*inputs, *parameters, *gates), LevelSpec.decoded(spec, numbers)
    check_saved(level, check_level(level, tensors, seed), grad_outputs, saved)
    found: list[Tensor] = []
    for losses in _together(level, grad_outputs):
        asked = asked_for(losses, tensors, spec, numbers, needs)
        found += [] if asked is None else _gradients(asked, saved, seed)
    return found


def _together(level: LevelSpec, grad_outputs: Sequence[Tensor | None]) -> Iterator[Sequence[Tensor | None]]:
    """The gradients of losses that go through the same launches.

    As many as there is room for, since each launch costs the host time: hidden layers' gradients, of which every loss
    has its own, then take at most twice what they take for a loss that reaches all experts.
    """
    each, room = len(level.gate_sizes), 2 * len(level.expert_inputs)
    first = experts = 0
    for start in range(0, len(grad_outputs), each):
        own = len(level.reached(grad is not None for grad in grad_outputs[start : start + each]).experts)
        if experts + own > room:
            yield grad_outputs[first:start]
            first, experts = start, 0
        experts += own
    yield grad_outputs[first:]


def _gradients(asked: Asked, saved: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
    """What is asked for, by the launches of one level."""
    level, part = asked.level, asked.part
    stored, statistics, logits = level.split_saved(saved)
    operands = (part.spec, asked.grad_outputs, asked.groups, stored)
    if level.stores_inputs:
        found = layerwise_backward.backward(*operands, statistics, seed, asked.needs)
    else:
        each = logits[0].split(level.gate_sizes, 1) if logits else ()
        found = chain_backward.backward(*operands, [each[k] for k in part.gates if each], asked.needs)
    groups = zip(found, part.spec.sizes, strict=True)
    return asked.pick([grad for group, size in groups for grad in group or [None] * size])
