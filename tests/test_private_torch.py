"""What of PyTorch's private parts this version no longer has, and that they are used in one file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

import mtlkernels
from mtlkernels import _torch

PACKAGE = Path(mtlkernels.__file__).parent
PRIVATE = re.compile(r"\btorch(?:\.\w+)*\._(?!_|foreach_)\w+|from torch[\w.]* import _\w+")


def test_each_name_is_there() -> None:
    """Each path that the file reads, by itself, so that a failure lists all that has gone."""
    paths = {
        ast.unparse(node) for node in ast.walk(ast.parse(Path(_torch.__file__).read_text())) if _is_path_of_torch(node)
    }
    assert len(paths) > 10
    gone = [path for path in sorted(paths) if not _resolves(path)]
    assert not gone, f"torch {torch.__version__} has no {', '.join(gone)}"


def test_no_other_file_names_them() -> None:
    named = {
        f"{file.relative_to(PACKAGE)}: {found}"
        for file in PACKAGE.rglob("*.py")
        if file.name != "_torch.py"
        for found in PRIVATE.findall(file.read_text())
    }
    assert not named


def _is_path_of_torch(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "torch"


def _resolves(path: str) -> bool:
    found: object = torch
    for name in path.split(".")[1:]:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True
