"""Operators called directly, as packages and compiled graphs call them: who does what autograd has to do."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from mtlkernels import _extension, _library
from tests.ops.level import operator

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="needs C++ kernels, which this install lacks")


def by_python(call: Callable[[], Any]) -> bool:
    """Whether Python's kernel ran."""
    seen = []

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        seen.append(event == "call" and code.co_filename == _library.__file__ and code.co_name == "kernel")

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert seen  # the call itself, if nothing else
    return any(seen)


def arguments(requires_grad: bool = False) -> list[Any]:
    """Of level_forward: three lists of tensors and more, with a None in two of the lists."""
    return list(operator.with_gate_layers(torch.float32, 5, requires_grad).forward(False))


def outputs(*args: Any) -> list[Tensor]:
    found: list[Tensor] = torch.ops.mtlkernels.level_forward(*args)
    return found


PLACES = pytest.mark.parametrize("place", [(0, 1), (1, 5), (2, 0)], ids=["an input", "a parameter", "a gate's weight"])


def test_nothing_to_record() -> None:
    args = arguments()
    assert not by_python(lambda: outputs(*args))
    assert not any(y.requires_grad for y in outputs(*args))
    wanted = arguments(requires_grad=True)
    with torch.no_grad():
        assert not by_python(lambda: outputs(*wanted))
        assert not any(y.requires_grad for y in outputs(*wanted))
    assert by_python(lambda: outputs(*wanted))


@PLACES
def test_one_tensor_that_wants_a_gradient(place: tuple[int, int]) -> None:
    args = arguments()
    tensor = args[place[0]][place[1]].requires_grad_()
    assert by_python(lambda: outputs(*args))
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs(*args)), tensor)
    assert gradient.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # PyTorch makes tangents of it
@PLACES
def test_one_tensor_that_has_a_tangent(place: tuple[int, int]) -> None:
    args = arguments()
    tensor = args[place[0]][place[1]]
    tangent = torch.ones_like(tensor)
    with torch.no_grad(), forward_ad.dual_level():
        assert not by_python(lambda: outputs(*args))
        args[place[0]][place[1]] = forward_ad.make_dual(tensor, tangent)
        assert by_python(lambda: outputs(*args))
        found = [forward_ad.unpack_dual(y).tangent for y in outputs(*args)]
    step = 1e-2
    moved = []
    for sign in (1, -1):
        args[place[0]][place[1]] = tensor + sign * step * tangent
        moved.append(outputs(*args))
    for y, up, down in zip(found, *moved, strict=True):
        slope = (up - down) / (2 * step)
        torch.testing.assert_close(torch.zeros_like(slope) if y is None else y, slope, rtol=2e-2, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("view", [False, True])
@PLACES
def test_a_tangent_that_comes_in_place_and_goes(place: tuple[int, int], view: bool) -> None:
    """Into the tensor itself, or into what it is a view of, of which it was made before."""
    args = arguments()
    base = args[place[0]][place[1]].clone()
    tensor = args[place[0]][place[1]] = base.view_as(base) if view else base
    expected = outputs(*args)
    with torch.no_grad(), forward_ad.dual_level():
        base.copy_(forward_ad.make_dual(base.clone(), torch.ones_like(base)))
        assert forward_ad.unpack_dual(tensor).tangent is not None
        assert by_python(lambda: outputs(*args))
        assert any(forward_ad.unpack_dual(y).tangent is not None for y in outputs(*args))
    assert not by_python(lambda: outputs(*args))
    for y, without in zip(outputs(*args), expected, strict=True):
        torch.testing.assert_close(y, without)


def test_whoever_looks_on() -> None:
    args = arguments()
    with FlopCounterMode(display=False) as counter:
        assert by_python(lambda: outputs(*args))
    assert counter.get_total_flops() > 0


def test_vmap() -> None:
    """Where a tensor is of several examples, as where each of them is by itself."""
    args = arguments()
    examples = torch.randn(3, 5, 4)

    def of(x: Tensor) -> list[Tensor]:
        return outputs([x, args[0][1]], *args[1:])

    for found, expected in zip(vmap(of)(examples), zip(*map(of, examples), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_a_lock_that_is_held_is_kept() -> None:
    """PyTorch holds the interpreter's lock while it runs a package, which has a lock of its own.

    If an operator gave the first away, another thread would take it, and wait with it for the second.
    """
    torch_cpu = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # PyDLL: with the lock
    call = torch_cpu.aoti_torch_call_dispatcher
    call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64)]
    gram = torch.ones(1, 1, dtype=torch.float64).expand(3000, 3000)  # takes some hundredths of a second
    (handle,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([gram])  # type: ignore[attr-defined]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    stack = (ctypes.c_uint64 * 8)(address(handle, None))  # of pcgrad_weights: all that follows is None, False or 0
    turns, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            turns[0] += 1
            time.sleep(0)  # gives the lock away

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # nobody gives the lock away unasked
    other = threading.Thread(target=count)
    other.start()
    try:
        before = turns[0]
        assert call(b"mtlkernels::pcgrad_weights", b"", stack) == 0
        during = turns[0] - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
    for result in stack[:2]:
        torch_cpu.aoti_torch_delete_tensor_object(ctypes.c_void_p(result))
    assert during == 0
