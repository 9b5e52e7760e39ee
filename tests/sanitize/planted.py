"""Makes faults in a process that has the build loaded: ``python -m tests.sanitize.planted LIBRARY NAME...``.

The library is planted.cpp; what is to be found says ``tests.csrc.sanitizers``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mtlkernels import _extension
from tests import instrumented
from tests.csrc import sanitizers


def compile_for(kind: str, target: Path) -> None:
    """Against the operators' library of a build, whose memory pool the faults are made in."""
    (library,) = instrumented.place(kind).glob("mtlkernels/lib/*/libmtlkernels.so")
    options = (f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", "-shared", "-lmtlkernels")
    sanitizers.compile_with_pool(kind, Path(__file__).parent / "planted.cpp", target, *options)


def main(library: str, *names: str) -> None:
    assert _extension.loaded(), _extension.load_error()
    torch.ops.load_library(library)
    for name in names:
        assert torch.ops.mtlkernels_planted.make(name), f"there is no fault {name}"


if __name__ == "__main__":
    main(*sys.argv[1:])
