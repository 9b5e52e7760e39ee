"""What the kernels are compiled against of a PyTorch: its headers and the libraries that they name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")


@dataclass(frozen=True)
class Sdk:
    """The headers and libraries of a minor version of PyTorch, in a folder of their own."""

    version: str
    folder: Path

    @property
    def options(self) -> list[str]:
        """For CMakeLists.txt."""
        include = self.folder / "torch" / "include"
        folders = f"{include};{include / 'torch' / 'csrc' / 'api' / 'include'}"
        return [
            f"-DTORCH_INCLUDE_DIRS={folders}",
            f"-DTORCH_LIBRARY_DIRS={self.folder / 'torch' / 'lib'}",
            "-DTORCH_CXX11_ABI=1",  # of every wheel of PyTorch since 2.7
        ]


def sdk(version: str, cache: Path) -> Sdk:
    """Downloads the wheel of the newest patch release, and keeps what is compiled against; once."""
    folder = cache / f"torch-{version}"
    if not (folder / "torch" / "version.py").exists():
        wheel = _download(version, cache / f"download-{version}")
        with zipfile.ZipFile(wheel) as archive:
            kept = [name for name in archive.namelist() if _wanted(name)]
            archive.extractall(folder, sorted(kept, key=lambda name: name == "torch/version.py"))  # at last
        shutil.rmtree(wheel.parent)
    found = (folder / "torch" / "version.py").read_text()
    if not re.search(rf"'{re.escape(version)}\.", found):
        raise SystemExit(f"{folder} is not of torch {version}")
    return Sdk(version, folder)


def _wanted(name: str) -> bool:
    return (
        name.startswith("torch/include/")
        or name == "torch/version.py"
        or name in [f"torch/lib/{library}" for library in LIBRARIES]
    )


def _download(version: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    subprocess.run([*pip, "--dest", str(folder), f"torch=={version}.*"], check=True)
    (wheel,) = folder.glob("torch-*.whl")
    return wheel
