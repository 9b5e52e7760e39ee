"""Python objects that only say that they are tensors, and memory that is not what it was."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import mtlkernels as mk
from tests import requires

ROOT = Path(__file__).parents[2]
ROUTING = mk.Routing.mmoe(2, 2)


def liars() -> list[Any]:
    kept = torch.randn(3, 8)
    return [mock.Mock(spec=torch.Tensor), weakref.proxy(kept), kept]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("place", ["weights", "gates", "inputs", "gram"])
def test_objects_that_say_they_are_tensors_are_refused(place: str, which: int) -> None:
    *found, kept = liars()
    odd, x = found[which], torch.randn(4, 8)
    weights, gates = [[kept, kept]], [torch.randn(2, 8)] * 2
    with pytest.raises((TypeError, ValueError)), torch.no_grad():
        if place == "weights":
            mk.expert_mixture(x, [[kept, odd]], None, None, ROUTING, gate_weights=gates)
        elif place == "gates":
            mk.expert_mixture(x, weights, None, None, ROUTING, gate_weights=[gates[0], odd])
        elif place == "inputs":
            mk.expert_mixture(odd, weights, None, None, ROUTING, gate_weights=gates)
        else:
            mk.gram([[kept], [odd]])


class Owner:
    """What a model may refer to weakly."""


@pytest.mark.parametrize("which", ["gone", "tensor", "mock"])
def test_attributes_that_take_no_part(which: str) -> None:
    model: Any = mk.nn.MMoE(8, 2, (6,), 2, batch_norm=True).eval()
    owner: Any = Owner() if which == "gone" else torch.ones(3)
    model.level.experts[0].owner = mock.Mock(spec=torch.Tensor) if which == "mock" else weakref.proxy(owner)
    if which == "gone":
        del owner
    x = torch.randn(4, 8)
    with torch.no_grad():
        first = model(x)
        for _ in range(6):
            assert all(map(torch.equal, model(x), first))


def test_parameters_that_are_exchanged_while_lists_are_made() -> None:
    """By what a collection of Python's calls; in a process of its own, which it once ended."""
    program = """
        import gc, torch
        import mtlkernels as mk
        model = mk.nn.MMoE(8, 2, (6,), 3)
        layer = model.level.experts[0].linears[0]
        def exchange(phase, info):
            if phase == "stop":
                layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
                layer.bias = torch.nn.Parameter(layer.bias.detach().clone())
        x = torch.randn(4, 8)
        expected = model(x)
        gc.callbacks.append(exchange)
        gc.set_threshold(1)
        for _ in range(100):
            found = model(x)
            assert all(map(torch.equal, found, expected))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True)


def test_a_parameter_whose_memory_became_too_short() -> None:
    """Though it lies where it lay, where the allocator hands that out again."""
    model = mk.nn.MMoE(256, 2, (100,), num_experts=2, activation="none").eval()
    weight, x = model.level.experts[0].linears[0].weight, torch.ones(2, 256)
    with torch.no_grad():
        for _ in range(6):
            model(x)
        storage, place = weight.untyped_storage(), weight.data_ptr()
        full = storage.nbytes()
        for share in (1.1, 2, 4, 8, 16):
            storage.resize_(0)
            storage.resize_(int(full / share) // 4 * 4)
            if weight.data_ptr() == place:
                break
        with pytest.raises(ValueError, match="bytes of memory"):
            model(x)


def test_gradients_without_memory() -> None:
    a, b = torch.randn(80000), torch.randn(80000)
    a.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] must have 320000 bytes of memory, got 0"):
        mk.gram([[a], [b]])


@requires.cpp_kernels
@pytest.mark.parametrize("how", ["storage", "data", "shorter", "elsewhere"])
def test_gradients_whose_memory_goes_between_the_passes(how: str) -> None:
    """Where a weighting runs, which may lead to whoever has kept them."""
    parameter, kept = nn.Parameter(torch.randn(5)), list[torch.Tensor]()
    parameter.register_hook(kept.append)

    def weighting(gram: torch.Tensor) -> torch.Tensor:
        for grad in kept:
            if how == "storage":
                grad.untyped_storage().resize_(0)
            elif how == "data":
                grad.data = torch.empty(0)
            elif how == "shorter":  # where it lay
                grad.data = torch.from_dlpack(grad[:2])
            else:  # above, so that what was there does not end past it
                grad.data = max([torch.empty_like(grad) for _ in range(64)], key=torch.Tensor.data_ptr)
        return torch.ones(len(gram), dtype=gram.dtype)

    optimizer = mk.optim.GramWeighted(torch.optim.SGD([parameter]), weighting, shared=[parameter])
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] must keep its memory"):
        optimizer.backward([parameter.square().sum(), parameter.sum()])
    assert parameter.grad is None


@pytest.mark.parametrize("rows", [2**61 - 1, 2**62 + 4096])
def test_more_rows_than_addresses(rows: int) -> None:
    """All of which lie in one place: the bytes of a result are just below, or just above, a power of two."""
    x, layer = torch.zeros(1, 1).expand(rows, 1), torch.zeros(1, 1)
    with pytest.raises(RuntimeError), torch.no_grad():
        mk.expert_mixture(x, [[layer, layer]], None, None, ROUTING, gate_weights=[torch.zeros(2, 1)] * 2)
    with pytest.raises(RuntimeError), torch.no_grad():
        mk.snr_aver([x, x], torch.ones(2, 2))


@pytest.mark.parametrize("rows", [4, 512])
def test_results_can_be_resized(rows: int) -> None:
    """As those of modules, of whatever size: by those who free what they keep, say."""
    model = mk.nn.MMoE(32, 2, (64,), 2)
    x = torch.randn(rows, 32, requires_grad=True)
    first, second = model(x)
    values = first.detach().clone()
    with torch.no_grad():
        first.detach().resize_(2 * rows, 64)
        assert torch.equal(first.detach()[:rows], values)
    (first.sum() + second.sum()).backward()
    for tensor in (second, x.grad, *(p.grad for p in model.parameters())):
        assert tensor is not None
        tensor.untyped_storage().resize_(0)
    assert isinstance(model, nn.Module)
