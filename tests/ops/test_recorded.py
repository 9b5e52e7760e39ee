"""The parts in C++ of a recorded call, which tensors on a CPU can try too; recordings themselves are Triton's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlkernels import _extension
from tests import requires
from tests.ops.test_tensor_subclasses import Wrapped

pytestmark = requires.cpp_kernels

X = torch.arange(6.0).view(2, 3)


def signature(moving: list[Tensor | None], fixed: list[Tensor | None]) -> bytes | None:
    words: bytes | None = _extension.function("signature")(moving, fixed)
    return words


def test_a_signature_tells_calls_apart() -> None:
    """By what launches depend on: not by where the tensors are that a call brings."""
    assert signature([X], [X]) == signature([X.clone()], [X]) != signature([X], [X.clone()])
    others = [X.double(), X.t(), X[:1], X.to("meta"), None]
    found = {signature([other], [X]) for other in (X, *others)}
    assert len(found) == 1 + len(others) and None not in found


@pytest.mark.parametrize("odd", [X.to_sparse(), Wrapped(X)], ids=["sparse", "wrapped"])
def test_tensors_without_memory_of_their_own_have_none(odd: Tensor) -> None:
    assert signature([X, odd], [X]) is None
    assert signature([X], [odd, X]) is None


def test_tensors_in_one_allocation() -> None:
    together = _extension.function("together")
    assert together(X, torch.float32, []) == []
    for shapes in ([[2, 3]], [[2, 3], [0], [5]]):
        found = together(X, torch.bfloat16, shapes)
        assert [(list(t.shape), t.dtype, t.is_contiguous()) for t in found] == [
            (s, torch.bfloat16, True) for s in shapes
        ]
        assert len({t.untyped_storage().data_ptr() for t in found}) == 1
        for i, t in enumerate(found):
            t.fill_(i)
        assert all((t == i).all() for i, t in enumerate(found))
    with pytest.raises(TypeError, match="a dtype was expected"):
        together(X, "float32", [[2, 3]])


def test_an_address_within_two_tensors_is_of_neither() -> None:
    """As of inputs that share memory: of the next ones, which may not, it would be that of one."""
    pytest.importorskip("triton")
    from mtlkernels.ops._recording import _Origins
    from mtlkernels.ops._table import Table

    whole = torch.zeros(8)
    first, second = whole[:6], whole[4:]
    origins = _Origins(Table(), [first, second], [])
    found = [origins.find(part.data_ptr(), part) for part in (whole[:1], whole[4:5], whole[5:], whole[6:], first)]
    assert found == [1, None, None, 2, 1]
    assert origins.find(second.data_ptr() + second.nbytes, None) is None
