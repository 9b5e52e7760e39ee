"""What autocast casts goes through one operator for many tensors: its bits and gradients are those of ``Tensor.to``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires

pytestmark = requires.cpp_kernels
HALVES = (torch.bfloat16, torch.float16)


def cast(tensors: Sequence[Tensor | None], half: torch.dtype) -> list[Any]:
    found: list[Any] | None = _extension.function("cast_together")(list(tensors), half)
    assert found is not None
    return found


def corners() -> Tensor:
    """Each exponent with fractions at, beside and between what halves have, and numbers that are none; both signs."""
    fractions = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF])
    bits = (torch.arange(256)[:, None] << 23 | fractions).flatten().int()
    return torch.cat([bits, bits | torch.iinfo(torch.int32).min]).view(torch.float32)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_bits(isa: str, half: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        for x in (corners(), torch.randn(50_000), torch.randn(40, 7, 3)):
            found = cast([x, x[1:], x[:0]], half)
            for own, given in zip(found, (x, x[1:], x[:0]), strict=True):
                assert_close(own, given.to(half), rtol=0, atol=0, equal_nan=True)
                assert torch.equal(own.signbit()[~given.isnan()], given.signbit()[~given.isnan()])


def every_bit_pattern(half: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(half)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_bits_of_gradients(isa: str, half: torch.dtype) -> None:
    grad = every_bit_pattern(half)
    x = torch.zeros(len(grad), requires_grad=True)
    with _extension.instruction_set(isa):
        (found,) = torch.autograd.grad(cast([x], half), x, grad)
    assert_close(found, grad.float(), rtol=0, atol=0, equal_nan=True)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "a transposed matrix": lambda: torch.randn(5, 7).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "every other column": lambda: torch.randn(5, 8)[:, ::2],
    "expanded": lambda: torch.randn(5, 1).expand(5, 4),
    "no elements": lambda: torch.randn(0, 4),
    "one number": lambda: torch.randn(()),
    "an odd place": lambda: torch.randn(30)[1:],
    "the other half precision": lambda: torch.randn(5).half(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = LAYOUTS[layout]().requires_grad_()
    neighbours = torch.randn(3, 4, requires_grad=True), torch.randn(6)
    (found, *others), expected = cast([x, *neighbours], torch.bfloat16), x.to(torch.bfloat16)
    assert_close(found, expected, rtol=0, atol=0)
    assert found.stride() == expected.stride()
    grads = [torch.autograd.grad(y, x, torch.full_like(y, 1.5))[0] for y in (found, expected)]
    assert_close(*grads, rtol=0, atol=0)
    for own, given in zip(others, neighbours, strict=True):
        assert_close(own, given.to(torch.bfloat16), rtol=0, atol=0)


def test_what_is_cast() -> None:
    """Float64 and integers stay, as do those that have the dtype, and None; constants do not come to want gradients."""
    stay = [torch.randn(2, dtype=torch.float64), torch.arange(3), torch.randn(2, dtype=torch.bfloat16), None]
    trained, constant = torch.randn(4, requires_grad=True), torch.randn(4)
    *same, a, b = cast([*stay, trained, constant], torch.bfloat16)
    assert all(own is given for own, given in zip(same, stay, strict=True))
    assert a.requires_grad and not b.requires_grad
    with torch.no_grad():
        assert not cast([trained], torch.bfloat16)[0].requires_grad
    with torch.inference_mode():
        assert cast([trained], torch.bfloat16)[0].is_inference()
    for odd in (torch.randn(6, device="meta"), torch._neg_view(torch.randn(6))):
        assert _extension.function("cast_together")([trained, odd], torch.bfloat16) is None


def test_gradients_that_are_not_wanted_or_not_there() -> None:
    xs = [torch.randn(3, requires_grad=True) for _ in range(3)]
    ys = cast(xs, torch.bfloat16)
    first, second, third = torch.autograd.grad(ys[0].sum(), xs, allow_unused=True, retain_graph=True)
    assert first is not None and second is None and third is None
    (alone,) = torch.autograd.grad([y.sum() for y in ys], xs[1])
    assert_close(alone, torch.ones(3))


def test_derivatives_of_derivatives() -> None:
    """By PyTorch's own casts, which are differentiated again."""
    x, w = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)

    def second(casts: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        a, b = casts([x, w])
        (first,) = torch.autograd.grad((a.float() ** 3 * b.float()).sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.pow(2).sum(), [x, w]))

    found = second(lambda given: cast(given, torch.bfloat16))
    assert_close(found, second(lambda given: [t.to(torch.bfloat16) for t in given]), rtol=0, atol=0)


def test_several_gradients_at_once() -> None:
    x = torch.randn(4, requires_grad=True)
    factors = torch.randn(3, 4).to(torch.bfloat16)
    (found,) = torch.autograd.grad(cast([x], torch.bfloat16), x, (factors,), is_grads_batched=True)
    assert_close(found, factors.float(), rtol=0, atol=0)


def test_leaves_that_share_an_object_and_hooks() -> None:
    x = torch.randn(4, requires_grad=True)
    seen: list[Tensor] = []
    x.register_hook(lambda grad: seen.append(grad))
    a, b = cast([x, x], torch.bfloat16)
    (a.float() * 2 + b.float()).sum().backward()
    assert_close(x.grad, torch.full((4,), 3.0))
    assert len(seen) == 1 and seen[0].dtype is torch.float32


def test_memory_that_is_gone() -> None:
    """As FSDP frees what is not in use: refused as by PyTorch, before anything is read."""
    x = torch.randn(64, 64)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        x.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        cast([x], torch.bfloat16)


def copies_below(outputs: Sequence[Tensor]) -> tuple[int, set[int]]:
    """How many nodes of ours cast, and the ids of leaves to which PyTorch's own lead."""
    ours, theirs = 0, set()
    below, seen = [y.grad_fn for y in outputs], set[Any]()
    while below:
        node: Any = below.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nexts = [other for other, _ in node.next_functions]
        ours += node.name() == "mtlkernels::CastBackward"
        if "ToCopy" in node.name():
            theirs |= {id(other.variable) for other in nexts if hasattr(other, "variable")}
        below += nexts
    return ours, theirs


@pytest.mark.parametrize("style", [{}, {"batch_norm": True}, {"dropout": 0.2}, {"activation": "prelu"}], ids=str)
def test_a_level_has_one_node_for_the_casts_of_its_experts(style: dict[str, Any]) -> None:
    trunk = mk.nn.MMoE(6, 2, (5, 4), num_experts=3, **style)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = copies_below(trunk(torch.randn(8, 6)))
    assert ours == 1
    experts = {id(p) for name, p in trunk.named_parameters() if "expert" in name}
    assert experts and not experts & theirs


def test_compiled_autograd() -> None:
    trunk, x = mk.nn.MMoE(6, 2, (5, 4), num_experts=3), torch.randn(8, 6)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.stack([y.float().square().sum() for y in trunk(x)]).sum()

    parameters = list(trunk.parameters())
    expected = torch.autograd.grad(loss(), parameters)
    for _ in range(2):
        trunk.zero_grad()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss().backward()
        assert_close([p.grad for p in parameters], list(expected))
