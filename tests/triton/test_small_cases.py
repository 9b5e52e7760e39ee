"""What ``make gpu`` gives to sanitizers launches every kernel of levels and SNR; here launches are only noted."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction  # noqa: E402

import mtlkernels  # noqa: E402
from benchmarks.gpu import slices  # noqa: E402
from mtlkernels import _backends  # noqa: E402
from mtlkernels.ops._triton_splits import Card  # noqa: E402
from mtlkernels.ops.level.triton import chain_backward  # noqa: E402
from tests.triton import cases, levels, norms, snr  # noqa: E402

KERNEL = re.compile(r"^@kernel.*\ndef (\w+)", re.MULTILINE)


def is_small(name: str) -> bool:
    """As pytest takes slices.SMALL, but for "ieee"."""
    return any(word in name for word in ("one_row", "aligned", "odd")) and "large" not in name


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool | None]]:
    """By the name of a kernel that was launched, whether its operands were aligned."""
    found: dict[str, set[bool | None]] = defaultdict(set)

    def note(kernel: Any, *args: Any, **options: Any) -> None:
        kind = options.get("KIND")
        found[kernel.__name__].add(None if kind is None else kind.aligned)

    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(_backends, "interpreting", lambda: True)
    monkeypatch.setattr(cases, "assert_within_budget", lambda *args: None)
    monkeypatch.setattr(torch, "equal", lambda a, b: True)
    return found


def launch(check: Callable[..., None], *args: Any, **options: Any) -> None:
    """Whose results are not there to be right."""
    with contextlib.suppress(AssertionError):
        check(*args, **options)


@pytest.mark.skipif(_backends.interpreting(), reason="the interpreter's launches are others")
def test_every_kernel_is_launched(seen: dict[str, set[bool | None]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert slices.SMALL == "ieee and (one_row or aligned or odd) and not large"
    for case in filter(lambda case: is_small(case.name), cases.cases(scale=8)):
        launch(cases.check_level, case, "cpu")
    for case in filter(lambda case: is_small(case.name), levels.cases(scale=8)):
        launch(cases.check_level, case, "cpu", linear=True)
    for name in filter(is_small, norms.cases(8)):
        launch(norms.check, name, "cpu", scale=8)
    for name in filter(is_small, snr.cases(8)):
        launch(snr.check, name, "cpu", scale=8)
    monkeypatch.setattr(chain_backward, "card", lambda _: Card(1, (9, 0)))
    wide = cases.Case("wide", 140, (400, 256, 16), 2, 2, (1, 2), dtype=torch.float16, largest_gate=2)
    launch(cases.check_level, wide, "cpu")  # as test_cuda.py has it
    folder = Path(mtlkernels.__file__).parent / "ops"
    kernels = {
        name for path in folder.rglob("*.py") if "pcgrad" not in str(path) for name in KERNEL.findall(path.read_text())
    }
    assert len(kernels) > 10
    missed = {name: seen[name] for name in kernels if seen[name] not in ({True, False}, {None})}
    assert missed == {"wide_input_gradient": {True}}
