"""What C++ kernels are built from; setup.py loads this file by itself, without PyTorch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(root: Path) -> str | None:
    """Of all that the C++ kernels of a checkout are compiled from; None where it is not, as in an installed wheel."""
    files = [root / "CMakeLists.txt", root / "mtlkernels" / "operators.txt"]
    if not (root / "csrc").is_dir() or not all(path.is_file() for path in files):
        return None
    own = (path for path in root.glob("csrc/**/*") if path.is_file())
    files += sorted(path for path in own if path.relative_to(root).parts[1] != "cuda")
    found = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()
