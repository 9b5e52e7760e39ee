"""The rooms of csrc/cpu: each includes what is below it, never what is above or beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
# What each may include beside itself; files in csrc/cpu itself are above all of them.
BELOW = {"runtime": {"common"}}
BELOW["simd"] = BELOW["runtime"] | {"runtime"}
BELOW["gemm"] = BELOW["simd"] | {"simd"}
BELOW["cast"] = BELOW["simd"] | {"simd"}
BELOW["level"] = BELOW["snr"] = BELOW["gemm"] | {"gemm"}
BELOW["pcgrad"] = BELOW["gemm"]
BELOW["mixture"] = BELOW["level"] | {"level"}  # gates


@pytest.mark.parametrize("room", sorted(path.name for path in CPU.iterdir() if path.is_dir()))
def test_includes_run_downwards(room: str) -> None:
    allowed = BELOW[room] | {room}
    found = [
        f"{path.name}: {included}"
        for path in (CPU / room).iterdir()
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        if included.split("/")[0] not in allowed
    ]
    assert not found
