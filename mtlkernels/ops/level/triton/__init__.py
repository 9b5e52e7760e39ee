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
from typing import Any

import torch
from torch import Tensor

from mtlkernels.ops._layout import in_memory
from mtlkernels.ops._recording import Finish, Recording, Recordings, apart, signature
from mtlkernels.ops._triton import Table, contiguous
from mtlkernels.ops.level.reference import Asked, asked_for
from mtlkernels.ops.level.serving import served
from mtlkernels.ops.level.spec import LevelSpec
from mtlkernels.ops.level.triton import chain_backward, chain_forward, layerwise_backward, layerwise_forward
from mtlkernels.ops.level.triton.operands import check_level, check_saved

Tensors = Sequence[Any]


def forward(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    spec: Sequence[int],
    numbers: Sequence[float],
    seed: Tensor | None,
    save: bool,
) -> list[Tensor]:
    """As the reference."""
    level = LevelSpec.decoded(spec, numbers)
    tensors: Tensors = (*inputs, *parameters, *gates)
    recording = recorded(level, tensors, save, seed)
    if recording is not None:
        return list(recording.replay(moving(level, tensors, seed)).list())
    check_level(level, tensors, seed)
    tensors = apart(in_memory(tensors))
    groups, table = level.split(tensors), Table()
    if level.stores_inputs:
        outputs, saved = layerwise_forward.forward(table, level, groups, seed, save)
    else:
        outputs, saved = chain_forward.forward(table, level, groups, save)
    own = moving(level, tensors, seed), _fixed(level, tensors)
    results = [*outputs, *saved]
    _keep(level, "forward", (save, _precision(inputs[0])), table, *own, results)
    return results


def serve(*args: Any) -> list[Tensor]:
    """As the reference."""
    return served(forward, args)


def recorded(level: LevelSpec, tensors: Tensors, save: bool, seed: Tensor | None = None) -> Recording | None:
    """What was recorded of a forward pass with such tensors, which need no checks then."""
    static = (save, _precision(tensors[0]))
    return _find(level, "forward", static, moving(level, tensors, seed), _fixed(level, tensors))


def replay_forward(level: LevelSpec, tensors: Tensors, save: bool, words: bytes | None) -> Any:
    """The outputs and what is saved, ``_C.Results``, by what was recorded of a forward pass with this signature.

    None where nothing was.
    """
    found = _known(level, "forward", (save, _precision(tensors[0])), words)
    return None if found is None else found.replay(moving(level, tensors))


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
    tensors = (*inputs, *parameters, *gates)
    return gradients(LevelSpec.decoded(spec, numbers), grad_outputs, tensors, saved, seed, tuple(needs))


def gradients(
    level: LevelSpec, grad_outputs: Tensors, tensors: Tensors, saved: Tensors, seed: Tensor | None, needs: Any
) -> list[Tensor]:
    """The same, of a spec's shared object and of all tensors in one list."""
    if len(grad_outputs) == len(level.gate_sizes):
        return list(_of_losses(level, grad_outputs, tensors, saved, seed, needs))
    found: list[Tensor] = []
    for losses in _together(level, grad_outputs):
        found += _of_losses(level, losses, tensors, saved, seed, needs)
    return found


def in_place(level: LevelSpec, grad_outputs: Tensors, tensors: Tensors, saved: Tensors, flags: bytes) -> Any:
    """Of one loss, each where its tensor stands, in a list or as ``_C.Results``.

    ``flags`` says which are wanted, a byte each; of its kind all may be returned.
    """
    return _of_losses(level, grad_outputs, tensors, saved, None, flags, True)


def replay_backward(level: LevelSpec, mask: Any, flags: bytes, words: bytes | None, moving: Tensors) -> Any:
    """The same by what was recorded of a backward pass with this signature, None where nothing was.

    ``mask`` says of which outputs there are gradients; ``moving`` are these, the forward pass's, and what it saved.
    """
    found = _known(level, "backward", (True, mask, flags, _precision(moving[0])), words)
    return None if found is None else found.replay(moving)


def _of_losses(
    level: LevelSpec,
    losses: Tensors,
    tensors: Tensors,
    saved: Tensors,
    seed: Tensor | None,
    wanted: Any,
    in_place: bool = False,
) -> Any:
    """The gradients that losses bring which go through the same launches."""
    mask = tuple(grad is not None for grad in losses)
    present = [grad for grad in losses if grad is not None]
    if all(grad.layout is torch.strided for grad in present):
        present = contiguous(present)
    others, fixed = (*moving(level, tensors, seed), *saved), _fixed(level, tensors)
    static = (in_place, mask, wanted, _precision(tensors[0]))
    if present:
        recording = _find(level, "backward", static, (*present, *others), fixed)
        if recording is not None:
            results = recording.replay((*present, *others))
            return results if in_place else results.list()
    needs = tuple(any(group) for group in level.split(wanted)) if in_place else wanted
    check_saved(level, check_level(level, tensors, seed), losses, saved)
    own = apart(in_memory((*present, *tensors)))
    present, tensors = own[: len(present)], own[len(present) :]
    others, fixed = (*moving(level, tensors, seed), *saved), _fixed(level, tensors)
    asked = asked_for(losses, tensors, level.encoded[0], level.encoded[1], needs)
    if asked is None:
        return [None] * level.num_tensors if in_place else []
    table = Table()
    found: list[Any] = _gradients(table, asked._replace(grad_outputs=present), saved, seed)
    if in_place:
        of_places = dict(zip(level.returned(losses, tensors, needs), found, strict=True))
        found = [of_places.get(i) for i in range(level.num_tensors)]
    _keep(level, "backward", static, table, (*present, *others), fixed, found)
    return found


# Recordings ----------------------------------------------------------------------------------------------------------


def moving(level: LevelSpec, tensors: Tensors, seed: Tensor | None = None) -> Tensors:
    """Those of a level's tensors that change from call to call: inputs, logits that are given, and the seed."""
    inputs = tensors[: level.num_inputs]
    if level.gate_inputs:
        return inputs
    return (*inputs, *tensors[-len(level.gate_sizes) :], *([] if seed is None else [seed]))


def _fixed(level: LevelSpec, tensors: Tensors) -> Tensors:
    """The others, which are parameters."""
    return tensors[level.num_inputs :] if level.gate_inputs else tensors[level.num_inputs : -len(level.gate_sizes)]


def _precision(x: Tensor) -> str:
    """What PyTorch's settings say of products of this dtype."""
    return str(torch.backends.cuda.matmul.fp32_precision) if x.dtype == torch.float32 else ""


def _find(level: LevelSpec, direction: str, static: Any, moving: Tensors, fixed: Tensors) -> Recording | None:
    if direction not in level.recordings:
        return None
    return _known(level, direction, static, signature(moving, fixed))


def _known(level: LevelSpec, direction: str, static: Any, words: bytes | None) -> Recording | None:
    """What was recorded of a call with a signature."""
    kept: Recordings | None = level.recordings.get(direction)
    return None if kept is None or words is None else kept.find(static, words)


def _keep(
    level: LevelSpec, direction: str, static: Any, table: Table, moving: Tensors, fixed: Tensors, returned: Tensors
) -> None:
    kept: Recordings = level.recordings.setdefault(direction, Recordings())
    words = signature(moving, fixed)
    if words is not None and kept.wants(static, words):
        kept.keep(static, words, table, moving, fixed, returned, _finish(table, returned))


def _finish(table: Table, returned: Tensors) -> Finish | None:
    """What a call does with its results behind its launches: some become zeros, unless they are NaN."""
    unmoved = [i for i, tensor in enumerate(returned) if any(tensor is other for other in table.unmoved)]
    if not unmoved:
        return None

    def finish(found: list[Any]) -> None:
        torch._foreach_mul_([found[i] for i in unmoved], 0.0)

    return finish


# Losses --------------------------------------------------------------------------------------------------------------


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


def _gradients(table: Table, asked: Asked, saved: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
    """What is asked for, by the launches of one level."""
    level, part = asked.level, asked.part
    stored, statistics, logits, signs = level.split_saved(saved)
    operands = (table, part.spec, asked.grad_outputs, asked.groups, stored)
    if level.stores_inputs:
        found = layerwise_backward.backward(*operands, statistics, seed, asked.needs)
    else:
        each = logits[0].split(level.gate_sizes, 1) if logits else ()
        found = chain_backward.backward(*operands, signs, [each[k] for k in part.gates if each], asked.needs)
    groups = zip(found, part.spec.sizes, strict=True)
    return asked.pick([grad for group, size in groups for grad in group or [None] * size])
