"""Faults that are put into a kernel's machine code are found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

pytest.importorskip("triton")
from benchmarks.gpu_model.cubin import TOOLS, Cubin, compile_kernel  # noqa: E402
from mtlkernels._backends import interpreting  # noqa: E402
from mtlkernels.ops.level.triton import gradient_kernels  # noqa: E402
from tests.triton import aot  # noqa: E402
from tests.triton.aot import Variant  # noqa: E402
from tests.triton.faults import SHARED, faults  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this Triton has no ptxas"),
    pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler"),
]
ARCHITECTURE = 90
_COUNTER = r"^.*\bATOMG\..*$"
_FENCE = r"^.*\bMEMBAR\.\w+\.GPU\b.*$"


def _without(pattern: str) -> Callable[[Cubin], Cubin]:
    return _with(pattern, "")


def _with(pattern: str, other: str) -> Callable[[Cubin], Cubin]:
    def change(cubin: Cubin) -> Cubin:
        sass, count = re.subn(pattern, other, cubin.sass, flags=re.MULTILINE)
        assert count
        return dataclasses.replace(cubin, sass=sass)

    return change


def _fence_comes_late(cubin: Cubin) -> Cubin:
    found = re.search(_FENCE, cubin.sass, re.MULTILINE)
    assert found
    return dataclasses.replace(cubin, sass=cubin.sass.replace(found[0], "") + found[0] + "\n")


CHANGES: dict[str, Callable[[Cubin], Cubin]] = {
    "16 bytes of registers spilled": lambda cubin: dataclasses.replace(cubin, stack=16),
    "more shared memory than": lambda cubin: dataclasses.replace(cubin, shared=SHARED[ARCHITECTURE] + 1),
    "more registers than the 65536": lambda cubin: dataclasses.replace(cubin, registers=288),
    "no products of tensor cores": _without(r"^.*\bHGMMA\..*$"),
    "products of single warps, HMMA, where a group of warps has HGMMA": _with(r"\bHGMMA\.\d+x\d+x\d+\.", "HMMA.16816."),
    "copies of fewer than 16 bytes": _with(r"\bLDGSTS\.E\.BYPASS\.128\b", "LDGSTS.E"),
    "no counter of the programs that share a sum": _without(_COUNTER),
    "no fence in front of an atomic operation": _without(_FENCE),
    "no fence in front": _fence_comes_late,
    "nothing discards the first-level cache": _without(r"^.*\bCCTL\.IVALL\b.*$"),
}


@pytest.fixture(scope="module")
def variant() -> Variant:
    """A product of whole tiles with a counter."""

    def fits(found: Variant) -> bool:
        constants = dict(found.constants)
        return found.dtype == "bf16" and constants["KIND"].aligned and constants["SPLIT"] and found.tile.rows >= 64

    codes = (aot.FORWARD_CODES, aot.BACKWARD_CODES)
    return next(found for found in aot.every_variant(*codes) if found.kernel == "input_gradient" and fits(found))


@pytest.fixture(scope="module")
def cubin(variant: Variant) -> Cubin:
    return compile_kernel(gradient_kernels.input_gradient, variant.tile, dict(variant.constants), ARCHITECTURE)


def found_in(variant: Variant, cubin: Cubin) -> list[str]:
    return list(faults(variant.tile, dict(variant.constants), cubin, ARCHITECTURE))


def test_as_it_is_shipped(variant: Variant, cubin: Cubin) -> None:
    assert found_in(variant, cubin) == []


@pytest.mark.parametrize("fault", CHANGES)
def test_a_fault_is_found(fault: str, variant: Variant, cubin: Cubin) -> None:
    found = found_in(variant, CHANGES[fault](cubin))
    assert any(fault in text for text in found), found


def test_an_atomic_operation_that_nothing_asks_for(variant: Variant, cubin: Cubin) -> None:
    constants = dict(variant.constants) | {"SPLIT": False}
    assert list(faults(variant.tile, constants, cubin, ARCHITECTURE)) == ["an atomic operation that nothing asks for"]
