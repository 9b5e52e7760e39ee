"""Walks over autograd's graph, by C++ and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension, _graph, _torch
from mtlkernels.ops.level import autograd
from mtlkernels.ops.level.node import level_of


class Twice(torch.autograd.Function):
    """A Function of Python."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


@pytest.fixture(params=[True, False], ids=["C++", "Python"])
def by_cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not _extension.has_module():
        pytest.skip("no direct way from this Python")
    if not request.param:
        monkeypatch.setattr(_extension, "has_module", lambda: False)
    return bool(request.param)


@pytest.mark.usefixtures("by_cpp")
class TestNotableNodes:
    def test_functions_and_marked_leaves(self) -> None:
        """Each once, and whatever the attribute's value is."""
        a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
        a.mark = True  # type: ignore[attr-defined]
        b.mark = None  # type: ignore[attr-defined]
        first = Twice.apply(a * c)
        second = Twice.apply(first + b)
        made, leaves = _graph.notable_nodes([second.sum(), (second * first).sum()], "mark")
        assert made == [second.grad_fn, first.grad_fn]
        assert {id(leaf) for leaf in leaves} == {id(a), id(b)} and len(leaves) == 2

    def test_losses_without_a_graph(self) -> None:
        leaf = torch.ones((), requires_grad=True)
        assert _graph.notable_nodes([], "mark") == ([], [])
        assert _graph.notable_nodes([leaf, torch.ones(())], "mark") == ([], [])

    def test_edges_to_nothing(self) -> None:
        """Of inputs that want no gradient."""
        y = Twice.apply(torch.ones(2, requires_grad=True) * torch.ones(2))
        assert _graph.notable_nodes([y.sum()], "mark") == ([y.grad_fn], [])


def test_a_node_is_walked_once() -> None:
    """However many ways lead to it: here there are 2^12."""
    y = torch.ones(2, requires_grad=True)
    for _ in range(12):
        y = y + y
    assert len(list(_graph.nodes([y.sum(), y.prod()]))) == 15


@pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")
def test_a_node_is_walked_once_by_cpp() -> None:
    """Otherwise this would take 2^200 steps."""
    y = Twice.apply(torch.ones(2, requires_grad=True))
    made = y.grad_fn
    for _ in range(200):
        y = y + y
    assert _graph.notable_nodes([y.sum(), y.prod()], "mark") == ([made], [])


@pytest.mark.parametrize("kind", ["made in C++", "of Python"])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_first_level(levels: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same node by C++ and in Python, of several losses, the first of which may meet none."""
    trunk = mk.nn.PLE(6, 2, (4,), 1, 1, num_levels=levels) if levels else None

    def losses(x: Tensor) -> Sequence[Tensor]:
        streams = list(trunk(x)) if trunk else [x, x]
        return [torch.ones(3, requires_grad=True).sum(), streams[1].sum() + x.sum(), Twice.apply(streams[0]).sum()]

    x = torch.randn(5, 6, requires_grad=True)
    if kind == "of Python":
        with mk.use_backend("reference"):
            found = losses(x)
    else:
        found = losses(x)
    level = _graph.first_level(found, autograd.Level)
    assert (level is None) == (levels == 0)
    if _extension.has_module():
        assert level is None or _torch.is_node_of(level, autograd.Level) == (kind == "of Python")
        assert level is None or level_of(level) is not None
        if kind == "of Python":
            monkeypatch.setattr(_extension, "has_module", lambda: False)
            assert _graph.first_level(found, autograd.Level) is level
