"""The Pythons of this machine, of which several versions are built for and tested."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What an interpreter must have: venv with pip, and the headers that the extension is compiled against.
PROBE = """
import ensurepip, os, sysconfig, venv
header = os.path.join(sysconfig.get_path("include"), "Python.h")
if not os.path.exists(header):
    raise SystemExit(f"there is no {header}")
"""


def candidates(version: str) -> Iterator[Path]:
    """Interpreters that may be of this version: those on the PATH, then pyenv's, the newest of them first."""
    for folder in environment()["PATH"].split(os.pathsep):
        yield Path(folder) / f"python{version}"
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    releases = root.glob(f"versions/{version}.*")
    yield from (
        path / "bin" / f"python{version}"
        for path in sorted(releases, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], reverse=True)
    )


def interpreter(version: str) -> Path | str:
    """A Python of this version that can build here, or why there is none."""
    reason = f"there is no python{version}"
    for path in candidates(version):
        if not path.is_file():
            continue
        probe = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, env=environment())
        if probe.returncode == 0:
            return path
        reason = f"{path.name} cannot build: {(probe.stderr.strip().splitlines() or ['it does not start'])[-1]}"
    return reason


def environment(**more: str) -> dict[str, str]:
    """This process' environment without what would leak into another: make's flags, the checkout's own packages."""
    leaks = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "PYTHON", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in leaks}
    folders = [
        folder for folder in kept.get("PATH", os.defpath).split(os.pathsep) if not Path(folder).is_relative_to(ROOT)
    ]
    return kept | {"PATH": os.pathsep.join(folders)} | more
