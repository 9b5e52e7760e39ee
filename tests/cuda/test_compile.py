"""How ``python -m tests.cuda.compile`` reads ptxas, and that it fails where it should."""

from __future__ import annotations

import pytest

from tests.cuda import compile as tool

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4mtlk4cuda11gram_kernelILi8EEEvNS0_13GramArgumentsE' for 'sm_90'
ptxas info    : Function properties for _ZN4mtlk4cuda11gram_kernelILi8EEEvNS0_13GramArgumentsE
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 228 registers, used 1 barriers, 18433 bytes smem
ptxas info    : Compile time = 745.788 ms
ptxas info    : Compiling entry function '_ZN4mtlk4cuda14combine_kernelENS0_16CombineArgumentsE' for 'sm_90'
ptxas info    : Function properties for _ZN4mtlk4cuda14combine_kernelENS0_16CombineArgumentsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, used 0 barriers
"""


def test_reads_every_kernel() -> None:
    gram, combine = tool.parse(REPORT.format(stack=0, stores=0, loads=0))
    assert gram == tool.Usage("gram<8>", 228, 0, 0, 0, 18433)
    assert combine == tool.Usage("combine", 80, 0, 0, 0, 0)


@pytest.mark.parametrize("what", ["stack", "stores", "loads"])
def test_a_spill_fails(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"stack": 0, "stores": 0, "loads": 0} | {what: 8}
    usages = list(tool.parse(REPORT.format(**figures)))
    monkeypatch.setattr(tool, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(tool, "supported", lambda _: {80, 90})
    monkeypatch.setattr(tool, "compile_kernels", lambda *_: (usages, ""))
    monkeypatch.setattr(tool, "compile_registration", lambda: "")
    monkeypatch.setattr("sys.argv", ["compile"])
    assert tool.main() == 1
    assert "compiled for sm_80, sm_90: 2 spill or fail" in capsys.readouterr().out


def test_what_does_not_compile_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(tool, "supported", lambda _: {90})
    monkeypatch.setattr(tool, "compile_kernels", lambda *_: ([], "pcgrad.cu(1): error"))
    monkeypatch.setattr(tool, "compile_registration", lambda: "")
    monkeypatch.setattr("sys.argv", ["compile"])
    assert tool.main() == 1
    assert "pcgrad.cu(1): error" in capsys.readouterr().out


def test_does_nothing_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, "nvcc", lambda: None)
    monkeypatch.setattr("sys.argv", ["compile"])
    assert tool.main() == 0
    assert "there is no nvcc" in capsys.readouterr().out
