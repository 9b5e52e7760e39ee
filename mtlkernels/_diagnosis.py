"""Why compiled kernels are missing and how to get them; imported when someone asks.

Words for people, of which ``show_config()`` and the report of ``convert`` take the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from mtlkernels import _backends, _extension

TRITON = "`pip install triton`, on Linux"
# As in the extra "build" of pyproject.toml.
_TOOLS = ("setuptools>=77.0.3", "wheel", "cmake>=3.26", "ninja", "pybind11>=2.13")
# What the loader says of a library that was built with other headers than those of what it finds.
_ABI = ("undefined symbol", "symbol not found", "version `")


@dataclass(frozen=True)
class Diagnosis:
    """Why something is missing, what to do, and for a build that failed the end of what it printed."""

    cause: str
    remedy: str
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


def missing(name: str, error: str, folder: Path = _extension.FOLDER) -> Diagnosis:
    """Why the extension ``name`` ("_C" or "_cuda") of the package in ``folder`` is not loaded, ``error`` being said."""
    if not folder.is_dir():
        return Diagnosis(
            f"the package lies within a file, {folder.parent}, where kernels cannot be loaded", "unpack it"
        )
    rebuild = f"{_needs(name)}: {build_command(folder)}"
    if has_file(name, folder):
        return Diagnosis(_why_it_does_not_load(name, error, folder), rebuild)
    if not _extension.is_supported(torch.__version__):
        cause = f"torch {torch.__version__} is older than {_extension.LEAST_TORCH}"
        return Diagnosis(cause, f"install torch {_extension.LEAST_TORCH} or later, then {rebuild}")
    if name == "_C" and (built := list(filter(_extension.is_supported, _extension.built_for(folder)))):
        there = f"torch {', '.join(built)}"
        cause = f"the kernels were built for {there}, and this is torch {torch.__version__}"
        return Diagnosis(cause, f"install one of these, or {rebuild}")
    cause, output = _why_there_is_none(name, folder)
    other = next((found for found in _other_packages(folder) if has_file(name, found)), None)
    if other is not None:
        cause = f"the folder {folder}, where Python looks first, shadows {other}, which has the kernels; here {cause}"
        rebuild = f"run Python in another working directory and with no such PYTHONPATH, or {rebuild}"
    elif sys.platform != "linux":
        rebuild = f"they are built on Linux only, not on {sys.platform}"
    return Diagnosis(cause, rebuild, output)


def of_another_source() -> Diagnosis:
    """What there is to say of kernels that :func:`_extension.of_another_source` finds."""
    rebuild = f"build them again: {build_command(_extension.FOLDER)}"
    return Diagnosis("the C++ kernels were built from another source than is here now", rebuild)


def no_kernels(device: str, dtype: torch.dtype) -> str:
    """Why nothing is faster than the reference on a device of this type, and what to do."""
    if device == "cpu":
        found = missing("_C", _extension.load_error() or "")
        more = ", with what `mk.show_config()` shows" if found.output else ""
        return f"{found.cause}{more}; {found.remedy}"
    if device == "cuda":
        if _backends.is_old():
            return f"the kernels are for NVIDIA GPUs of compute capability {_backends.MIN_MAJOR}.0 and later"
        if _backends.has_triton():
            return f"there are kernels for other dtypes than {dtype} only"
        return f"Triton is missing; {TRITON}"
    if device == "meta":
        return f"there are no kernels for any device: {no_kernels('cpu', dtype)}; for NVIDIA GPUs {TRITON}"
    return f"there are no kernels for devices of type {device!r}"


def build_command(folder: Path) -> str:
    """What builds the kernels of the package in ``folder``, to be pasted into a shell."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    return f"`{pip} {shlex.join(_TOOLS)} && {pip} --no-build-isolation {_source(folder)}`"


def has_file(name: str, folder: Path) -> bool:
    """Whether a package has the C++ kernels for this PyTorch, or those for CUDA for this Python."""
    if name == "_C":
        return (_extension.place(torch.__version__, folder) / _extension.LIBRARY).exists()
    return any((folder / f"{name}{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def _needs(name: str) -> str:
    needed = "a C++20 compiler and nvcc" if name == "_cuda" else "a C++20 compiler"
    if os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return f"build them, with {needed}"
    return f"build them, once {needed} is installed, as by `apt-get install g++`"


def _why_there_is_none(name: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Why a package has no extension for this Python, and what its build said if it failed."""
    build = _extension.record(name, folder)
    foreign = sorted(file.name for file in folder.glob(f"{name}.*.so"))
    if foreign:
        return f"{foreign[0]} is built for another Python than this {sys.implementation.cache_tag}", ()
    if build.get("outcome") == "failed":
        return f"the kernels' build for torch {build['torch']} failed", tuple(build["output"])
    if build.get("outcome") == "skipped":
        return f"the kernels were left out of the install, as {build['reason']}", ()
    return "the kernels were never built", ()


def _why_it_does_not_load(name: str, error: str, folder: Path) -> str:
    built = _extension.record(name, folder).get("torch")
    if any(sign in error for sign in _ABI):
        built_for = f"torch {built}" if built and built != torch.__version__ else "another torch"
        return f"the kernels were built for {built_for}, and this is torch {torch.__version__}"
    if "cannot open shared object file" in error:
        return f"the kernels need a library that is not here, {error.partition(':')[0]}"
    return f"the kernels do not load: {error}"


def _source(folder: Path) -> str:
    """pip's arguments for the source of the package in ``folder``."""
    if _is_source(folder.parent):
        return f"-e {shlex.quote(str(folder.parent))}"
    for distribution in importlib.metadata.distributions(name="mtlkernels"):
        if Path(str(distribution.locate_file("mtlkernels"))).resolve() == folder.resolve():
            url = _direct_url(distribution)
            vcs, path = url.get("vcs_info"), _path(url)
            if vcs is not None:
                source = f"mtlkernels @ {vcs['vcs']}+{url['url']}@{vcs['commit_id']}"
                return f"--force-reinstall --no-deps {shlex.quote(source)}"
            if path is not None and _is_source(path):
                return shlex.quote(str(path))
    return "FOLDER` where FOLDER is the one with mtlkernels' source and its `setup.py"


def _is_source(folder: Path) -> bool:
    return (folder / "setup.py").exists() and (folder / "csrc").is_dir() and (folder / "mtlkernels").is_dir()


def _other_packages(folder: Path) -> Iterator[Path]:
    """The packages of this name that Python would find without the one in ``folder``."""
    editable = [
        path
        for distribution in importlib.metadata.distributions(name="mtlkernels")
        for path in [_path(_direct_url(distribution))]
        if path is not None and _direct_url(distribution).get("dir_info", {}).get("editable")
    ]
    for parent in dict.fromkeys([*map(Path, sys.path), *editable]):
        package = (parent / "mtlkernels").resolve()
        if package != folder.resolve() and (package / "__init__.py").exists():
            yield package


def _direct_url(distribution: importlib.metadata.Distribution) -> dict[str, Any]:
    """Where pip found a distribution, if not on an index."""
    return dict(json.loads(distribution.read_text("direct_url.json") or "{}"))


def _path(url: dict[str, Any]) -> Path | None:
    parsed = urlparse(url.get("url", ""))
    return Path(unquote(parsed.path)) if parsed.scheme == "file" else None
