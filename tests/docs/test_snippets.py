"""Every Python snippet of README and of the site runs, and prints what the page says that it prints.

A page's snippets run one after another in one namespace. ``<!-- run`` to ``-->`` is code that a reader does not see,
such as a double for a library that is not on PyPI; what it changes by ``monkeypatch`` is undone behind the page. A
``text`` block right behind a snippet is what it prints; ``...`` in it stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import logging
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import mtlkernels as mk
from mtlkernels._convert import registry

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<shown>.*?)^```$(?:\n+```text\n(?P<printed>.*?)^```$)?", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"^<!-- run\n(?P<shown>.*?)^-->$", re.MULTILINE | re.DOTALL)
ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(text: str) -> list[re.Match[str]]:
    return sorted([*BLOCK.finditer(text), *HIDDEN.finditer(text)], key=lambda match: match.start())


WITH_SNIPPETS = [page for page in PAGES if blocks(page.read_text())]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.ModuleType]:
    """The module that a page is: what it registers, makes, writes or logs is gone afterwards."""
    logger = logging.getLogger("mtlkernels")
    level, handlers = logger.level, list(logging.getLogger().handlers)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module)["monkeypatch"] = monkeypatch
    yield module
    logger.setLevel(level)
    logging.getLogger().handlers = handlers
    mk.log_decisions()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# Of PyTorch's exporters: what they say of themselves and of what they call.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning:torch.export")  # of 2.10
@pytest.mark.parametrize("path", WITH_SNIPPETS, ids=[str(path.relative_to(ROOT)) for path in WITH_SNIPPETS])
def test_snippets(path: Path, page: types.ModuleType) -> None:
    text = path.read_text()
    if "aoti_compile" in text and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs a C++ compiler, which this machine lacks")
    for block in blocks(text):
        before = text.count("\n", 0, block.start("shown"))
        code = compile("\n" * before + block["shown"], str(path), "exec")  # errors name the page's own lines
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, vars(page))
        printed: Any = block.groupdict().get("printed")
        if printed is not None:
            same = doctest.OutputChecker().check_output(printed, out.getvalue(), ALIKE)
            assert same, f"{path.name}, line {before + 1}, prints\n{out.getvalue()}\ninstead of\n{printed}"


def test_none_is_overlooked() -> None:
    """Every block of Python is one that the test above runs."""
    for path in PAGES:
        text = path.read_text()
        assert len(re.findall(r"^\s*(?:```+|~~~+) *(?:py|python|pycon)\b", text, re.MULTILINE)) == len(
            BLOCK.findall(text)
        ), path
