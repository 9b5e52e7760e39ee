"""Builds the C++ kernels with CMake and ninja where that is possible; otherwise the install is pure Python.

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


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


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; a failure leaves a pure-Python install and says so."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DTORCH_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            subprocess.run(command, check=True)


missing = what_is_missing()
if missing is not None:
    print(f"mtlkernels: installing without the C++ kernels: {missing}", file=sys.stderr)

setup(
    ext_modules=[] if missing else [Extension("mtlkernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
