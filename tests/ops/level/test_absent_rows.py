"""Few rows are computed by kernels of 4 and 8 rows. What an earlier call left in the place of those that are not there
must not be computed with: where it is subnormal, all but products (tests/ops/test_subnormals.py) takes longer."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest
import torch
from torch import nn

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires

pytestmark = [
    requires.cpp_kernels,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="reads a register by what Linux on x86-64 has"
    ),
]

ROUTING = mk.Routing.mmoe(3, 2)
# Numbers that are subnormal where they are computed with.
SUBNORMAL = {torch.float64: 1e-310, torch.float32: 1e-40, torch.bfloat16: 1e-39}
MXCSR, SUBNORMAL_OPERAND, EXCEPTIONS = slice(28, 32), 1 << 1, 0x3F  # in what fegetenv writes


def met_subnormals() -> bool:
    """Whether this thread has computed with subnormal numbers since the last call."""
    libm = ctypes.CDLL("libm.so.6")
    environment = ctypes.create_string_buffer(32)
    libm.fegetenv(environment)
    state = int.from_bytes(environment.raw[MXCSR], "little")
    cleared = bytearray(environment.raw)
    cleared[MXCSR] = (state & ~EXCEPTIONS).to_bytes(4, "little")
    libm.fesetenv(bytes(cleared))
    return bool(state & SUBNORMAL_OPERAND)


def run(rows: int, scale: float, dtype: torch.dtype, norm: bool) -> tuple[bool, bool]:
    """Whether the forward and the backward pass met subnormal numbers."""
    x = (torch.rand(rows, 64) + 0.5).to(dtype).mul(scale).requires_grad_()
    weights = [(torch.rand(3, *shape) + 0.1).to(dtype).requires_grad_() for shape in ((48, 64), (32, 48))]
    norms = [[nn.LayerNorm(48, dtype=dtype) for _ in range(3)], None] if norm else None
    grads = [(torch.rand(rows, 32) + 0.5).to(dtype).mul(scale)] * 2
    logits = torch.randn(rows, 6, dtype=dtype)
    met_subnormals()
    outputs = mk.expert_mixture(x, weights, None, logits, ROUTING, activation="none", norms=norms)
    forward = met_subnormals()
    torch.autograd.grad(outputs, [x, *weights], grads)
    return forward, met_subnormals()


@pytest.mark.parametrize("rows", [3, 5, 6, 7])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("number", SUBNORMAL)
@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_no_subnormals_of_an_earlier_call(isa: str, number: torch.dtype, norm: bool, rows: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the flags are a thread's
    try:
        with mk.use_backend("cpp"), _extension.instruction_set(isa):
            left_there = run(8, SUBNORMAL[number], number, norm)
            assert run(rows, 1.0, number, norm) == (False, False)
    finally:
        torch.set_num_threads(threads)
    if number == torch.float32:
        assert left_there[1]  # the flag tells them; forward all that reads them is products
