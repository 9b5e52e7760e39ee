"""Builds the C++ and CUDA kernels with CMake and ninja where that is possible; otherwise the install does without.

What became of each is written into the package, to ``mtlkernels/_build.json``, from which ``mtlkernels.show_config()``
tells why kernels are missing. Here is, too, what the package's page says, which is made of README.md. Everything else
about the package is in pyproject.toml. release/wheel.py and tests import this file, which does nothing by itself then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, __version__, setup

if int(__version__.partition(".")[0]) < 77:  # as pyproject.toml says, which pip does not read without isolation
    raise SystemExit(
        f"mtlkernels is built with setuptools 77.0.3 or later, here is {__version__}: pip install -U setuptools"
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CUDA = "mtlkernels._cuda"
LIBRARY = "libmtlkernels.so"  # of the operators, without Python
RECORD = "_build.json"
# Of a failed build: enough for a compiler's message and what cmake says around it.
KEPT_LINES = 20
# By what CMake has configured a folder. What it reads of the environment when it does so for the first time, and keeps.
CONFIGURED = "configured.json"
READ_ONCE = ("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE", "CMAKE_PREFIX_PATH")
READ_ONCE += ("CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDAARCHS", "CUDA_PATH")

# Of release/wheel.py: a folder with kernels for several versions of PyTorch and Python, to be put into a wheel for all.
PREBUILT = os.environ.get("MTLKERNELS_PREBUILT")

# For each extension that was built, failed or was left out, what mtlkernels/_diagnosis.py reads.
outcomes: dict[str, dict[str, Any]] = {}


def source() -> str | None:
    """A digest of what the C++ kernels are built from, made by the package, which PyTorch must be there to import."""
    spec = importlib.util.spec_from_file_location("_source", ROOT / "mtlkernels" / "_source.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: str | None = module.digest(ROOT)
    return found


def cpp() -> str:
    """The Python module of the C++ kernels, in a folder for the minor version of torch that they are built for."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return f"mtlkernels.lib.torch{major}_{minor}._C"


def what_is_missing() -> str | None:
    """Why the kernels are not built here, or None. MTLKERNELS_PURE=1 builds none, for a wheel of every system."""
    if os.environ.get("MTLKERNELS_PURE") == "1":
        return "this is the wheel without kernels"
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed in the building environment (use --no-build-isolation)"
    old = older_torch()
    if old is not None:
        return old
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    own = shlex.split(os.environ.get("CXX", ""))[:1]  # CMake asks it first
    if not any(shutil.which(compiler) for compiler in (*own, "c++", "g++", "clang++")):
        return "there is no C++ compiler"
    if sys.platform != "linux":
        return f"the kernels are built on Linux only, not on {sys.platform}"
    return None


def older_torch() -> str | None:
    """That the torch which is installed is older than the one that pyproject.toml asks for, or None."""
    import torch

    (least,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    own = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if own is None or tuple(map(int, own.groups())) >= tuple(map(int, least.split("."))):
        return None
    return f"torch {torch.__version__} is older than {least}"


def what_is_missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None. MTLKERNELS_BUILD_CUDA=1 builds them for another machine."""
    import torch

    if torch.version.cuda is None and os.environ.get("MTLKERNELS_BUILD_CUDA") != "1":
        return "this torch is built without CUDA"
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        return "nvcc is not on the PATH"
    return None


def keep_if_the_same(build: Path, options: Sequence[str]) -> None:
    """Empties a folder that CMake has configured by other options or for another compiler, as it would keep to those.

    Where both are the same the folder stays, so that only sources that have changed are compiled again.
    """
    environment = {name: os.environ[name] for name in READ_ONCE if os.environ.get(name)}
    asked = json.dumps({"options": list(options), "environment": environment}, indent=1) + "\n"
    configured = build / CONFIGURED
    if configured.exists() and configured.read_text() == asked:
        return
    if build.exists():
        shutil.rmtree(build)
    build.mkdir(parents=True)
    configured.write_text(asked)


def is_made_as(path: Path, extension: Path) -> bool:
    """Whether a file is an extension, for this Python, or the library that lies beside it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return path.parent == extension.parent and path.name in (f"{extension.name}{suffix}", LIBRARY)


class SourcesOnly(build_py):
    """Packs the modules that are there: setuptools keeps its folder, and what an earlier build has left in it."""

    def run(self) -> None:
        if not self.editable_mode:
            self.remove_what_is_gone()
        super().run()

    def remove_what_is_gone(self) -> None:
        """All but this build's own files, the libraries that it is about to make again, and what became of these.

        Libraries for another PyTorch or Python would be packed, though they may be of another source.
        """
        own = {Path(file) for file in self.get_outputs(include_bytecode=False)}
        made = [Path(self.build_lib, *ext.name.split(".")) for ext in self.distribution.ext_modules or ()]
        for path in Path(self.build_lib, "mtlkernels").rglob("*"):
            stays = path in own or path.name == RECORD or any(is_made_as(path, extension) for extension in made)
            if path.is_file() and not stays:
                path.unlink()


class CMakeBuild(build_ext):
    """Runs CMake, once an extension; after a failure the install does without that extension, and says so."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            for name, outcome in outcomes.items():
                if outcome["outcome"] == "failed":
                    self.remove(CUDA if name == "_cuda" else cpp())
            write_record(ROOT / "mtlkernels")

    def copy_extensions_to_source(self) -> None:
        """And what setuptools does not know of: the operators' library, which lies beside the Python module."""
        for extension in self.extensions:
            built = Path(self.build_lib, *extension.name.split(".")).parent
            in_place = Path(self.get_ext_fullpath(extension.name)).parent
            in_place.mkdir(parents=True, exist_ok=True)
            if (built / LIBRARY).exists():
                beside = (
                    in_place / f"{LIBRARY}.new"
                )  # as what is written over crashes the processes that have it loaded
                shutil.copy(built / LIBRARY, beside)
                beside.replace(in_place / LIBRARY)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        if PREBUILT:
            shutil.copytree(PREBUILT, Path(self.build_lib, "mtlkernels", "lib"), dirs_exist_ok=True)
            outcomes["_C"] = {"outcome": "built"}
            return
        import torch

        name = ext.name.rpartition(".")[2]
        against = {"torch": str(torch.__version__), "python": sys.implementation.cache_tag}
        of = {} if ext.name == CUDA else {"source": source()}  # as it is before it is compiled
        try:
            self.run_cmake(ext)
        except CompileError as error:
            outcomes[name] = {"outcome": "failed", "output": str(error).splitlines(), **against}
            self.remove(ext.name)
            raise
        outcomes[name] = {"outcome": "built", **against, **of}

    def remove(self, extension: str) -> None:
        """What an earlier build has left, which would be installed in the place of one that failed."""
        path = Path(self.get_ext_fullpath(extension))
        path.unlink(missing_ok=True)
        if extension != CUDA:
            (path.parent / LIBRARY).unlink(missing_ok=True)

    def run_cmake(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        path = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = ext.name == CUDA
        kind = "cmake-cuda" if cuda else "cmake"
        build = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        options = [
            "-S", str(ROOT / "csrc" / "cuda" if cuda else ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            *([f"-DMTLK_OUTPUT_NAME={path.name}"] if cuda else options_for_cpp()),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        # pip has another place for each install, and Python several names: neither asks for another build.
        here = [f"-DCMAKE_INSTALL_PREFIX={path.parent}", *([] if cuda else [f"-DPython_EXECUTABLE={sys.executable}"])]
        keep_if_the_same(build, options)
        try:
            run(["cmake", *here, *options])
        except CompileError:
            shutil.rmtree(build, ignore_errors=True)  # cmake would go on with the compiler that it has found
            raise
        run(["cmake", "--build", str(build)])
        run(["cmake", "--install", str(build)])


def run(command: list[str]) -> None:
    """Runs a command and shows what it prints; where it fails, the error is the end of that."""
    printed = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            sys.stdout.write(line)
            printed.append(line.rstrip())
    if job.returncode:
        raise CompileError("\n".join([*end_of(printed), f"{command[0]} failed with exit status {job.returncode}"]))


def end_of(printed: list[str]) -> list[str]:
    """The last lines, without ninja's progress and commands; the first error before them, should it not be there."""
    lines = []
    for previous, line in zip(["", *printed], printed, strict=False):
        if line.strip() and not re.match(r"\[\d+/\d+\]", line) and not previous.startswith("FAILED:"):
            lines.append(line[:300])
    last = lines[-KEPT_LINES:]
    if any(re.search(r"\berror\b", line) for line in last):
        return last
    return [line for line in lines[:-KEPT_LINES] if re.search(r"\berror\b", line)][:1] + last


class BuildRecord(Command):
    """Writes what became of each extension into the package that is built, or in place into this folder's."""

    description = f"write mtlkernels/{RECORD}"
    user_options: list[Any] = []
    editable_mode = False
    build_lib: Any = None

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        write_record(ROOT / "mtlkernels" if self.editable_mode else Path(self.build_lib, "mtlkernels"))

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "mtlkernels", RECORD))]

    def get_output_mapping(self) -> dict[str, str]:
        return {self.get_outputs()[0]: str(Path("mtlkernels", RECORD))} if self.editable_mode else {}


def write_record(folder: Path) -> None:
    """Keeps what is known of an extension that an earlier build left here, and that this one could not build again."""
    file = folder / RECORD
    try:
        earlier = json.loads(file.read_text())
    except (OSError, ValueError):
        earlier = {}
    record = dict(outcomes)
    for name, outcome in earlier.items():
        if record.get(name, {}).get("outcome", "skipped") == "skipped" and any(folder.rglob(f"{name}.*")):
            record[name] = outcome
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def options_for_cpp() -> list[str]:
    """What CMakeLists.txt asks for, beside what csrc/cuda/CMakeLists.txt does."""
    import pybind11
    import torch

    return [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DTORCH_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]


class WheelForAll(bdist_wheel):
    """With kernels that were built before, for every Python: what is of one version carries that in its name."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2]) if PREBUILT else super().get_tag()


def page() -> str:
    """README.md as the package's page: without pictures and links to the repository's files, which are not with it."""
    code = r"```.*?```|<!--.*?-->"  # which stay as they are
    picture = r"!\[[^\]]*\]\((?P<picture>[^)\s]+)\)\n*"
    link = r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)"
    elsewhere = re.compile(r"[a-z]+:|#")  # another site, or a place on the page itself

    def replaced(found: re.Match[str]) -> str:
        target = found["picture"] or found["target"]
        if target is None or elsewhere.match(target):
            return found[0]
        return found["text"] or ""

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    title, _, rest = re.sub(f"{code}|{picture}|{link}", replaced, text, flags=re.DOTALL).partition("\n")
    note = "*The README of the repository, without its pictures and its links to other files there.*"
    return f"{title}\n\n{note}\n{rest}"


def main() -> None:
    # cmake and ninja from PyPI lie beside the interpreter, also where its environment is not activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    extensions = [Extension("mtlkernels.lib", sources=[])] if PREBUILT else []
    missing = "it was built before" if PREBUILT else what_is_missing()
    for name, reason in (("mtlkernels._C", missing), (CUDA, missing or what_is_missing_for_cuda())):
        if reason is None:
            extensions.append(Extension(name if name == CUDA else cpp(), sources=[], optional=True))
        elif not PREBUILT:
            print(f"mtlkernels: installing without {name}: {reason}", file=sys.stderr)
            outcomes[name.rpartition(".")[2]] = {"outcome": "skipped", "reason": reason}
    build.sub_commands = [*build.sub_commands, ("build_record", None)]
    setup(
        long_description=page(),
        long_description_content_type="text/markdown",
        ext_modules=extensions,
        cmdclass={
            "build_ext": CMakeBuild,
            "build_py": SourcesOnly,
            "build_record": BuildRecord,
            "bdist_wheel": WheelForAll,
        },
    )


if __name__ == "__main__":
    main()
