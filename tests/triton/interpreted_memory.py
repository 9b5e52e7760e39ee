"""Memory that kernels read by addresses, and what lies in it; ``test_interpreter.py`` runs this by the interpreter."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.utils import prune

import mtlkernels as mk
from mtlkernels import use_backend
from mtlkernels._backends import interpreting
from mtlkernels.ops._table import Table
from mtlkernels.ops._triton_functions import share_of
from mtlkernels.ops.level import reference
from mtlkernels.ops.level import triton as kernels
from mtlkernels.ops.level.spec import Layer, LevelSpec
from mtlkernels.ops.pcgrad import triton as pcgrad
from tests.triton.recorded import Level, gradients, noted

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")
CALLS = 5  # of which the last ones are replayed


def negated(tensor: Tensor) -> Tensor:
    """The same values, by PyTorch's bit."""
    found = torch._neg_view(-tensor)
    assert found.is_neg()
    return found


def test_negated_parameters_and_gates() -> None:
    level = Level()
    inputs = level.inputs(9)
    with use_backend("triton"):
        expected = level(inputs)
        for _ in range(CALLS):
            torch.testing.assert_close(level.mapped(negated)(inputs), expected)


def test_negated_gradients_and_zeros_without_memory() -> None:
    level = Level()
    inputs = [x.requires_grad_() for x in level.inputs(9)]
    with use_backend("triton"):
        for _ in range(CALLS):
            outputs = level(inputs)
            plain = [torch.randn_like(y) for y in outputs]
            plain[1] = torch.zeros_like(outputs[1])
            odd = [negated(plain[0]), torch._efficientzerotensor(*outputs[1].shape), *plain[2:]]
            expected = torch.autograd.grad(outputs, inputs, plain, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(outputs, inputs, odd), expected)


def test_negated_gradients_of_tasks() -> None:
    grads = [torch.tensor([3.0, 2.0]), torch.tensor([1.0, -4.0])]
    odd = [negated(grads[0]), grads[1]]
    torch.testing.assert_close(pcgrad.gram(odd, 2), pcgrad.gram(grads, 2))
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(pcgrad.combine(odd, 2, weights), pcgrad.combine(grads, 2, weights))


OPS: dict[str, Any] = {
    "expert_mixture": lambda x, z: mk.expert_mixture(x, [[x, x]], None, [z], mk.Routing.mmoe(2, 1)),
    "gated_mixture": lambda x, z: mk.gated_mixture(x.expand(2, 8, 8).transpose(0, 1), [z], mk.Routing.mmoe(2, 1)),
    "snr_trans": lambda x, z: mk.snr_trans([x, x], [[x, x]], z[:1]),
    "pcgrad": lambda x, z: mk.pcgrad([[x], [x]], order=[[1], [0]]),
}


@pytest.mark.parametrize("op", OPS)
def test_tables_lie_in_the_memory_of_the_host(op: str) -> None:
    """Whatever the default device is: a copy from a GPU's memory to itself would be waited for."""
    x, z = torch.randn(8, 8), torch.rand(8, 2)
    with use_backend("triton"):
        expected = OPS[op](x, z)
        with torch.device("meta"):
            found = OPS[op](x, z)
    for y, right in zip(found, expected, strict=True):
        torch.testing.assert_close(y, right)


@pytest.mark.parametrize("calls", [0, CALLS])
@pytest.mark.parametrize("which", ["input", "weight", "bias", "gate"])
def test_memory_that_is_gone_is_refused(which: str, calls: int) -> None:
    level = Level()
    inputs = level.inputs(9)
    with use_backend("triton"):
        for _ in range(calls):
            level(inputs)
        chosen = {"input": inputs[0], "weight": level.weights[0][1], "bias": level.biases[1][0], "gate": level.gates[0]}
        chosen[which].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="bytes of memory, got 0"):
            level(inputs)


def test_recordings_hold_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[Any] = []
    room = Table.room

    def noting(self: Table, *args: Any) -> Tensor:
        found = room(self, *args)
        rooms.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Table, "room", noting)
    level = Level()
    with use_backend("triton"), noted() as replayed:
        for _ in range(CALLS):
            gradients(level, level.inputs(9))
    assert replayed and rooms
    replayed.clear()
    gc.collect()
    assert not [each for each in rooms if each() is not None]


@triton.jit
def shares(out, length, splits):
    low, high = share_of(length, tl.program_id(0), splits)
    tl.store(out + 2 * tl.program_id(0), low)
    tl.store(out + 2 * tl.program_id(0) + 1, high)


@pytest.mark.parametrize("length", [0, 1, 31, 100, 2**26, 2**31 - 1])
@pytest.mark.parametrize("splits", [1, 3, 32])
def test_shares_are_all_of_a_length(length: int, splits: int) -> None:
    found = torch.zeros(2 * splits, dtype=torch.int64)
    shares[(splits,)](found, length, splits)
    expected = [length * share // splits for share in range(splits + 1)]
    assert found.view(-1, 2).tolist() == [list(pair) for pair in zip(expected, expected[1:], strict=False)]


def test_an_expert_twice_in_a_gate() -> None:
    """By the operator; a routing refuses it."""
    spec = LevelSpec(1, (0, 0), (0, 0, 1), (3,), (Layer(0),))
    weights: list[Tensor | None] = [torch.randn(16, 16) / 4 for _ in range(2)]
    args = ([torch.randn(4, 16)], [*weights, None, None], [torch.randn(4, 3)], *spec.encoded, None, False)
    torch.testing.assert_close(kernels.forward(*args), reference.forward(*args))


def test_a_trunk_with_pruned_biases() -> None:
    """As on CPUs: they are no parameters any more, and count."""
    model: Any = mk.nn.MMoE(16, 2, (16, 16), num_experts=2)
    for expert in model.level.experts:
        for layer in expert.linears:
            prune.random_unstructured(layer, "bias", 0.5)
    x = torch.randn(5, 16)
    with use_backend("triton"):
        torch.testing.assert_close(model(x), model.level._by_modules([x]))
