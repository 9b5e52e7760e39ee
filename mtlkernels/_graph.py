"""Walks over autograd's graph, by C++ where there is a direct way: in Python they take as long as small passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from mtlkernels import _extension, _torch


def nodes(losses: Sequence[Tensor]) -> Iterator[Any]:
    """Those that losses depend on, each once: what a loss alone depends on before the next loss's."""
    seen: set[Any] = set()
    for loss in losses:
        below = [loss.grad_fn]
        while below:
            node = below.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            yield node
            below += [other for other, _ in node.next_functions]


def notable_nodes(losses: Sequence[Tensor], attribute: str) -> tuple[list[Any], list[Tensor]]:
    """The nodes that losses depend on which Functions in Python have made, and the leaves that have an attribute."""
    if _extension.has_module():
        found: tuple[list[Any], list[Tensor]] = _extension.function("notable_nodes")(losses, attribute)
        return found
    made, leaves = [], []
    for node in nodes(losses):
        if _torch.is_leaf_node(node):
            if hasattr(node.variable, attribute):
                leaves.append(node.variable)
        elif _torch.is_of_python(node):
            made.append(node)
    return made, leaves


def first_level(losses: Sequence[Tensor], function: Any) -> Any:
    """The node of a level that a loss meets first, made in C++ or by this Function in Python; None without one."""
    if _extension.has_module():
        return _extension.function("first_level")(losses, function)
    return next((node for node in nodes(losses) if _torch.is_node_of(node, function)), None)
