"""A level's node in autograd's graph, whichever made it: the Function in Python, or C++ past it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mtlkernels import _extension, _torch
from mtlkernels._backends import triton_module
from mtlkernels._tracing import observed
from mtlkernels.ops._autograd import grads_are_batched
from mtlkernels.ops.level import autograd
from mtlkernels.ops.level.spec import LevelSpec

_NUMBERS = itertools.count(1)
_LIVE: WeakValueDictionary[int, Losses] = WeakValueDictionary()


class Node:
    """A level's node that C++ has made, which holds its tensors, as the backward pass of :class:`Level` knows its own.

    Args:
        context: the node's ``mtlkernels._C.LevelContext``.
        node: the node, which has to be there as long as this is used.
    """

    def __init__(self, context: Any, node: Any = None) -> None:
        self._context, self._node = context, node
        backend = None if not context.by_name else "triton" if context.recorded else "cpp"
        self.plan = autograd.Plan(LevelSpec.decoded(*context.encoded), backend, context.recorded)
        self.num_gates = len(self.plan.spec.gate_sizes)

    @property
    def losses(self) -> Losses | None:
        return _LIVE.get(self._context.losses)

    @losses.setter
    def losses(self, losses: Losses | None) -> None:
        self._context.losses = 0 if losses is None else losses.number

    @cached_property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """As that of :meth:`Level.apply`'s arguments. For several losses whatever this pass is after."""
        context, losses = self._context, self.losses
        return (False, *(context.variables if losses is not None and losses.runs() else context.needs), False)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        return tuple(self._context.saved)

    @property
    def num_saved(self) -> int:
        return int(self._context.num_saved)


def gradients_of_node(context: Any, grads: Sequence[Any]) -> Any:
    """What C++ asks of a node's backward pass: gradients of all of the level's tensors, in a list or ``_C.Results``.

    Of a call that was recorded it first asks :func:`replayed` and then :func:`recorded`, unless somebody looks on.
    """
    watched = torch.is_grad_enabled() or observed() or grads_are_batched(grads)
    if watched or not context.recorded or context.losses:
        return autograd.Level.backward(Node(context), *grads)[1:-1]
    stored, count = context.saved, context.num_saved
    tensors, saved = stored[: len(stored) - count - 1], stored[len(stored) - count :]  # between them is the seed
    return recorded(context.words, grads, tensors, saved, context.flags)


def replayed(words: bytes, mask: Any, flags: bytes, signature: Any, moving: Sequence[Any]) -> Any:
    """The same, ``_C.Results``, by what was recorded of such a backward pass; None where nothing was.

    ``mask``: of which outputs there are gradients; ``flags``: whose gradients are wanted. ``signature`` is that of all
    tensors, ``moving`` are those that change from call to call.
    """
    return triton_module("level").replay_backward(_spec(words), mask, flags, signature, moving)


def recorded(words: bytes, grads: Sequence[Any], tensors: Sequence[Any], saved: Sequence[Any], flags: bytes) -> Any:
    """The same where nothing was, which may record it."""
    return triton_module("level").in_place(_spec(words), grads, tensors, saved, flags)


@lru_cache(256)
def _spec(words: bytes) -> LevelSpec:
    """The spec of 64-bit ints, which hash faster side by side than one by one."""
    return LevelSpec.decoded(memoryview(words).cast("q").tolist(), ())


def level_of(node: Any) -> Any:
    """What the backward pass of :class:`Level` knows of a node in autograd's graph; None for one of anything else."""
    if _torch.is_node_of(node, autograd.Level):
        return node
    context = _extension.function("level_context")(node) if _extension.has_module() else None
    return None if context is None else Node(context, node)


class Losses:
    """What several losses' passes bring to a level's outputs; once it has run, what they take on from its inputs.

    ``loss`` is the one whose pass runs the level, and ``mark`` a node in that pass and in no other. A node that C++ has
    made knows losses by their ``number``, which means nothing any more when they are gone.
    """

    def __init__(self, count: int) -> None:
        self.loss, self.mark = 0, cast(Any, None)
        self.number = next(_NUMBERS)
        _LIVE[self.number] = self
        self._grads: list[Sequence[Tensor | None]] = [()] * count
        self._found: list[list[Tensor | None]] = [[] for _ in range(count)]
        self._stream: Any = None

    def runs(self) -> bool:
        """Whether the backward pass that asks is the one that is to run the level.

        Others come to its node meanwhile, from a hook within that pass or from another thread.
        """
        return _torch.will_execute(self.mark)

    def hold(self, loss: int, grad_outputs: Sequence[Tensor | None]) -> None:
        self._grads[loss] = grad_outputs

    def run(self, ctx: Any, grad_outputs: Sequence[Tensor | None]) -> None:
        """The level's backward pass, of the losses that bring a gradient."""
        self.hold(self.loss, grad_outputs)
        reaching = [i for i, grads in enumerate(self._grads) if any(grad is not None for grad in grads)]
        if not reaching:
            return
        stored = ctx.saved_tensors
        found = autograd.level_gradients(ctx, stored, [grad for i in reaching for grad in self._grads[i]])
        # A node has an edge for each tensor that its function was applied to, and in C++ none for the seed.
        end = ctx.plan.spec.num_tensors if isinstance(ctx, Node) else len(stored) - ctx.num_saved
        tensors = [i for i, tensor in enumerate(stored[:end]) if tensor is not None]
        width = len(found) // len(reaching)
        for number, loss in enumerate(reaching):
            self._found[loss] = [found[number * width + i] for i in tensors]
        if stored[0].is_cuda:
            self._stream = torch.cuda.current_stream(stored[0].device)

    def take(self) -> list[list[Tensor | None]]:
        """For each loss the gradients of the level's tensors, or none; for the stream of whoever calls."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return self._found
