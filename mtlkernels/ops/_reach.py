"""What the gradients that a level's backward pass receives flow into: the rest keeps no gradient, not one of zeros.

Eager PyTorch tells a backward pass which outputs nobody used. Compiled code hands it zeros for these, so that there
gradients are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Reach(NamedTuple):
    """Whether each input stream, expert and gate is reached."""

    inputs: Sequence[bool]
    experts: Sequence[bool]
    gates: Sequence[bool]


def reach_of(
    grads: Sequence[Any],
    num_inputs: int,
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    gates_read: bool = False,
) -> Reach | None:
    """What the gradients of a level's K outputs reach, None where each output has one and so all is reached.

    ``gates_read``: gates are layers of their own, of input k or of the only one.
    """
    if all(grad is not None for grad in grads):
        return None
    inputs, experts = [False] * num_inputs, [False] * len(expert_inputs)
    start = 0
    for k, (grad, size) in enumerate(zip(grads, gate_sizes, strict=True)):
        if grad is not None:
            for e in gate_experts[start : start + size]:
                experts[e] = True
                if num_inputs:
                    inputs[expert_inputs[e]] = True
            if gates_read:
                inputs[k if num_inputs > 1 else 0] = True
        start += size
    return Reach(inputs, experts, [grad is not None for grad in grads])


def keep(grads: Sequence[Any], reached: Sequence[bool]) -> list[Any]:
    """The gradients of tensors, perhaps in several runs of ``reached``, None for those that are not reached."""
    return [grad if reached[i % len(reached)] else None for i, grad in enumerate(grads)]
