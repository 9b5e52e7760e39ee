"""Builds the C++ and CUDA kernels with CMake and ninja where that is possible; otherwise the install does without.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CPP, CUDA = "mtlkernels._C", "mtlkernels._cuda"


def what_is_missing() -> str | None:
    """Why the kernels cannot be built here, or None."""
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed in the building environment (use --no-build-isolation)"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return "there is no C++ compiler"
    if sys.platform != "linux":
        return f"the kernels are built on Linux only, not on {sys.platform}"
    return None


def what_is_missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None. MTLKERNELS_BUILD_CUDA=1 builds them for another machine."""
    import torch

    if torch.version.cuda is None and os.environ.get("MTLKERNELS_BUILD_CUDA") != "1":
        return "this torch is built without CUDA"
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        return "nvcc is not on the PATH"
    return None


class CMakeBuild(build_ext):
    """Runs CMake, once an extension; after a failure the install does without that extension, and says so."""

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        path = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = ext.name == CUDA
        kind = "cmake-cuda" if cuda else "cmake"
        build = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        configure = [
            "cmake", "-S", str(ROOT / "csrc" / "cuda" if cuda else ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DCMAKE_INSTALL_PREFIX={path.parent}",
            *([f"-DMTLK_OUTPUT_NAME={path.name}"] if cuda else options_for_cpp()),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise CompileError(str(error)) from error


def options_for_cpp() -> list[str]:
    """What CMakeLists.txt asks for, beside what csrc/cuda/CMakeLists.txt does."""
    import pybind11
    import torch

    return [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DTORCH_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]


extensions = []
missing = what_is_missing()
for name, reason in ((CPP, missing), (CUDA, missing or what_is_missing_for_cuda())):
    if reason is None:
        extensions.append(Extension(name, sources=[], optional=True))
    else:
        print(f"mtlkernels: installing without {name}: {reason}", file=sys.stderr)

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
