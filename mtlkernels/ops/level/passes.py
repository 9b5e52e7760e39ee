"""The backward passes of several losses, in which each level runs once for all of them.

The graph is cut at its levels. The passes go, one after another, from the losses to the outputs of the levels that they
meet first; such a level runs its backward operator once, with the gradients of all losses; and the passes go on from
its inputs. Whatever else is in the graph, as towers and embeddings are, is walked once a loss.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlkernels import _extension, _torch
from mtlkernels.ops.level.checkpointed import recomputes_more
from mtlkernels.ops.level.node import Losses, level_of

Grads = list[Tensor | None]


@dataclass
class Part:
    """What of a graph lies between ``level``, or the losses where that is None, and the ``levels`` below.

    Attributes:
        leaves: the ids of the leaves in it, but for what the level alone leads to at once.
        direct: the ids of leaves to which the level leads at once, and where no hook waits.
        end: where a pass may end that runs the level and nothing below it.
    """

    level: Any
    levels: list[Any] = field(default_factory=list)
    leaves: set[int] = field(default_factory=set)
    direct: set[int] = field(default_factory=set)
    end: GradientEdge | None = None


def cut(losses: Sequence[Tensor], passes: int | None = None) -> list[Part]:
    """The parts of the losses' graph, each behind those above it; only one where it cannot be cut.

    It can where every node lies in one part. One in two would get its gradient in two pieces, and hooks, or functions
    that are not linear in it, would see these instead of their sum. Leaves to which levels lead at once may be those
    of several, as no pass is after them; but to some tensor that it was applied to each level must lead alone, where
    a pass may end that is to run it. Hooks on a module's backward pass keep what they have seen of one loss until
    they see the next, so that no two may be under way. Where PyTorch looks for NaN in what nodes return, they have to
    return it. Checkpoints may be computed again more often by parts than by so many passes, by default one a loss.
    """
    whole = [Part(None)]
    if _torch.in_compiled_autograd() or torch.is_anomaly_enabled():
        return whole
    parts = [Part(None, leaves={id(loss) for loss in losses if loss.grad_fn is None})]
    numbers: dict[Any, int] = {}  # of the parts, by node
    waiting: set[Any] = set()
    below = [loss.grad_fn for loss in losses]
    reached = set(below)  # by a loss, or from a node that is no level's
    while _walk(below, parts[-1], len(parts), numbers, reached):
        waiting.update(parts[-1].levels)
        if not waiting:
            if recomputes_more([part.level for part in parts[1:]], passes or len(losses)):
                return whole
            return parts if _set_ends(parts, reached) and not _runs_levels(parts) else whole
        level = max(waiting, key=_torch.sequence_number)  # no other of these is above it
        waiting.remove(level)
        nodes = [node for node, _ in level.next_functions]
        direct = {node for node in nodes if _is_plain_leaf(node)}
        below = [node for node in nodes if node not in direct]
        parts.append(Part(level, direct={id(node.variable) for node in direct}))
    return whole


def _set_ends(parts: Sequence[Part], reached: set[Any]) -> bool:
    """Finds each level's end; False where one has none.

    A leaf if there is one, as hooks on another tensor would be called with None; of others a parameter's, which come
    last, such as a copy that autocast has made.
    """
    edges = {part.level: [edge for edge in reversed(_inputs(part.level)) if edge is not None] for part in parts[1:]}
    uses = Counter(node for own in edges.values() for node in {edge.node for edge in own})
    for part in parts[1:]:
        own = [edge for edge in edges[part.level] if uses[edge.node] == 1 and edge.node not in reached]
        leaves = [edge for edge in own if _is_plain_leaf(edge.node)]
        part.end = next(iter([*leaves, *(edge for edge in own if not _torch.is_leaf_node(edge.node))]), None)
        if part.end is None:
            return False
    return True


def _runs_levels(parts: Sequence[Part]) -> bool:
    """Whether a pass to a part's leaves would run levels below it, as these lead to one of them at once."""
    arrived: set[int] = set()
    for part in reversed(parts):
        if not arrived.isdisjoint(part.leaves):
            return True
        arrived |= part.direct
    return False


def _walk(start: Sequence[Any], part: Part, number: int, numbers: dict[Any, int], reached: set[Any]) -> bool:
    """Fills a part with what is below ``start``; False where some is in another one, or a hook stands against it.

    ``reached`` gets the nodes to which any of these leads but levels.
    """
    stack = [node for node in start if node is not None]
    while stack:
        node = stack.pop()
        before = numbers.get(node)
        if before is not None:
            if before != number:
                return False
            continue
        numbers[node] = number
        if level_of(node) is not None:
            if _has_hooks(node):
                return False
            part.levels.append(node)
            continue
        if _torch.is_module_hook(node):
            return False
        if _torch.is_leaf_node(node):
            part.leaves.add(id(node.variable))
        below = [other for other, _ in node.next_functions if other is not None]
        reached.update(below)
        stack += below
    return True


def _has_hooks(level: Any) -> bool:
    """Whether hooks wait on a level's node itself, which would be called for one of several losses alone."""
    return _extension.has_module() and bool(_extension.function("has_node_hooks")(level))


def differentiate(
    losses: Sequence[tuple[Sequence[Any], Any]], parts: Sequence[Part], leaves: Sequence[Tensor]
) -> list[Grads]:
    """The gradients of each loss for some leaves, None for one that it does not reach; frees the graph.

    A loss is a sum of ``(tensors, factors)``; without factors, None, they count once. ``parts`` are those of
    :func:`cut`, from all of these tensors.
    """
    result: list[Grads] = [[None] * len(leaves) for _ in losses]
    places = {id(leaf): i for i, leaf in enumerate(leaves)}
    casts = _torch.cast_gradients(leaves)
    own_end = {part.level: part.end for part in parts}
    # Where each loss's pass goes on below a level, and with which gradients.
    starts: dict[Any, list[tuple[Sequence[Any], Any]]] = {None: list(losses)}
    for part in parts:
        own = starts.pop(part.level)
        wanted = [i for i, leaf in enumerate(leaves) if id(leaf) in part.leaves]
        of_losses = {level: Losses(len(losses)) for level in part.levels}
        last, to_run = max((i for i, (outputs, _) in enumerate(own) if outputs), default=0), _last_to_reach(own, part)
        for i, (outputs, grads) in enumerate(own):
            # The last pass that reaches a level runs its node, which sees to all losses; the others end at its outputs.
            running = [level for level in part.levels if to_run.get(level) == i]
            ends: dict[Any, Sequence[Any]]
            ends = {level: [own_end[level]] if level in running else _outputs(level) for level in part.levels}
            sought: list[Any] = [*(leaves[at] for at in wanted), *itertools.chain(*ends.values())]
            if not outputs or not sought:
                continue
            with _run(running, of_losses, i) as marks:
                found = iter(_gradients(outputs, sought, grads, marks, retain_graph=i < last))
            for at in wanted:
                result[i][at] = _sum(result[i][at], next(found))
            for level, edges in ends.items():
                reached = [next(found) for _ in edges]
                if level not in running:
                    of_losses[level].hold(i, reached)
        for level, held in of_losses.items():
            inputs = _below(level, places)
            starts[level] = [_going_on(inputs, *pair, casts) for pair in zip(held.take(), result, strict=True)]
    return result


def _outputs(level: Any) -> list[GradientEdge]:
    return [GradientEdge(level, k) for k in range(level_of(level).num_gates)]


def _inputs(level: Any) -> list[GradientEdge | None]:
    """Where gradients of the tensors that the level was applied to go; None for those that want none."""
    return [None if node is None else GradientEdge(node, number) for node, number in level.next_functions]


def _last_to_reach(starts: Sequence[tuple[Sequence[Any], Any]], part: Part) -> dict[Any, int]:
    """For each level that is next below, which of the passes is the last to come to it."""
    found: dict[Any, int] = {}
    for i in range(len(starts) - 1, -1, -1):
        if len(found) == len(part.levels):
            break
        below = Part(None)
        _walk(
            [output.node if isinstance(output, GradientEdge) else output.grad_fn for output in starts[i][0]],
            below,
            0,
            {},
            set(),
        )
        for level in below.levels:
            found.setdefault(level, i)
    return found


@contextmanager
def _run(levels: Sequence[Any], of_losses: dict[Any, Losses], loss: int) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The nodes of these levels see to all losses, of which this one's pass comes to them.

    It is to go from the first of two tensors to the second, too, by which the nodes know it.
    """
    if not levels:
        yield None
        return
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        root = leaf.clone()
    try:
        for level in levels:
            losses = of_losses[level]
            losses.loss, losses.mark = loss, root.grad_fn
            level_of(level).losses = losses
        yield root, leaf
    finally:
        for level in levels:
            level_of(level).losses = None


def _gradients(
    outputs: Sequence[Any], sought: Sequence[Any], grads: Any, marks: tuple[Tensor, Tensor] | None, retain_graph: bool
) -> Sequence[Tensor | None]:
    """Those of one pass, and behind them that of the second of the marks, if there are any."""
    if marks is not None:
        grads = [*([None] * len(outputs) if grads is None else grads), None]
        outputs, sought = [*outputs, marks[0]], [*sought, marks[1]]
    return torch.autograd.grad(outputs, sought, grads, retain_graph=retain_graph, allow_unused=True)


def _is_plain_leaf(node: Any) -> bool:
    """Whether a gradient that comes to this node has arrived: it is a leaf's, and no hook waits."""
    return node is not None and _torch.is_leaf_node(node) and not node.variable._backward_hooks


def _below(level: Any, places: dict[int, int]) -> list[GradientEdge | int | None]:
    """Where the gradients of a level's inputs go: to an edge, to that place among leaves, or nowhere."""
    found: list[GradientEdge | int | None] = []
    for edge in _inputs(level):
        node: Any = None if edge is None else edge.node
        found.append(places.get(id(node.variable)) if _is_plain_leaf(node) else edge)
    return found


def _going_on(
    inputs: Sequence[GradientEdge | int | None], grads: Grads, result: Grads, casts: Mapping[int, torch.dtype]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Where a loss's pass goes on from a level with these gradients of its inputs.

    Those of leaves go to their places in ``result``, in the dtypes that ``casts`` names.
    """
    edges, going_on = [], []
    for to, grad in zip(inputs, grads, strict=True) if grads else ():
        if to is None or grad is None:
            continue
        if isinstance(to, int):
            result[to] = _sum(result[to], grad.to(casts[to]) if to in casts else grad)
        else:
            edges.append(to)
            going_on.append(grad)
    return edges, going_on


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of two parts of a gradient, as a parameter has that is used twice."""
    return a + b if a is not None and b is not None else b if a is None else a
