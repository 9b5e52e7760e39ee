"""Why kernels are missing, and a command that gets them: of installs that went wrong, each a folder of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _config, _diagnosis, _extension, _source
from tests import requires

ROOT = Path(__file__).parents[1]
MAJOR, MINOR = map(int, torch.__version__.split(".")[:2])
FILE = f"lib/torch{MAJOR}_{MINOR}/libmtlkernels.so"
NOT_FOUND = "not built"
MISSING = _extension._Loaded(error=NOT_FOUND)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other mtlkernels is on Python's path or installed."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    monkeypatch.setattr(sys, "platform", "linux")


def package(folder: Path, record: Any = None, file: str | None = None) -> Path:
    """A package with a record of its build and a file, neither of which has to be there."""
    found = folder / "mtlkernels"
    found.mkdir(parents=True)
    (found / "__init__.py").touch()
    if record is not None:
        (found / "_build.json").write_text(json.dumps(record))
    if file is not None:
        (found / file).parent.mkdir(parents=True, exist_ok=True)
        (found / file).write_bytes(b"not a shared object")
    return found


def checkout(folder: Path) -> Path:
    found = package(folder)
    (folder / "setup.py").touch()
    (folder / "csrc").mkdir()
    return found


class Distribution:
    """What pip has written about an install in ``folder``."""

    def __init__(self, folder: Path, url: dict[str, Any] | None) -> None:
        self.folder, self.url = folder, url

    def locate_file(self, name: str) -> Path:
        return self.folder / name

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.url is None else json.dumps(self.url)


def test_never_built(tmp_path: Path) -> None:
    found = _diagnosis.missing("_C", NOT_FOUND, package(tmp_path))
    assert found.cause == "the kernels were never built"
    assert found.remedy.startswith("build them, with a C++20 compiler: `") or "apt-get install g++" in found.remedy


def test_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "packages.zip").touch()
    found = _diagnosis.missing("_C", NOT_FOUND, tmp_path / "packages.zip" / "mtlkernels")
    assert "lies within a file" in found.cause and "packages.zip" in found.cause and found.remedy == "unpack it"


def test_left_out(tmp_path: Path) -> None:
    folder = package(tmp_path, {"_C": {"outcome": "skipped", "reason": "torch is not installed"}})
    found = _diagnosis.missing("_C", NOT_FOUND, folder)
    assert found.cause == "the kernels were left out of the install, as torch is not installed"


def test_a_build_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"outcome": "failed", "torch": "2.13.0", "output": ["a.cpp:1: error: no", "ninja: stopped"]}
    folder = package(tmp_path, {"_C": record})
    found = _diagnosis.missing("_C", NOT_FOUND, folder)
    assert found.cause == "the kernels' build for torch 2.13.0 failed"
    assert found.output == ("a.cpp:1: error: no", "ninja: stopped")
    monkeypatch.setattr(_extension, "_cpp", MISSING)
    monkeypatch.setattr(_diagnosis, "missing", lambda *_: found)
    lines = mk.show_config().splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("extension ")]
    assert lines[at + 1 : at + 3] == ["  | a.cpp:1: error: no", "  | ninja: stopped"]
    assert "failed, with what `mk.show_config()` shows; " in _diagnosis.no_kernels("cpu", torch.float32)


def test_built_for_another_torch(tmp_path: Path) -> None:
    error = f"{FILE}: undefined symbol: _ZN3c105ErrorC2E"
    known = package(tmp_path / "a", {"_C": {"outcome": "built", "torch": "2.1.0"}}, FILE)
    unknown = package(tmp_path / "b", None, FILE)
    for folder, words in ((known, "torch 2.1.0"), (unknown, "another torch")):
        found = _diagnosis.missing("_C", error, folder)
        assert found.cause == f"the kernels were built for {words}, and this is torch {torch.__version__}"
        assert "--no-build-isolation" in found.remedy


def test_kernels_for_another_torch_are_not_loaded(tmp_path: Path) -> None:
    """Some of them would load, and read structures that are laid out otherwise now."""
    folder = package(tmp_path, None, f"lib/torch{MAJOR}_{MINOR + 1}/libmtlkernels.so")
    package(tmp_path / "older", None, f"lib/torch{MAJOR}_9/libmtlkernels.so")
    (tmp_path / "older" / "mtlkernels" / "lib" / f"torch{MAJOR}_9").rename(folder / "lib" / f"torch{MAJOR}_9")
    both = f"{MAJOR}.9 and {MAJOR}.{MINOR + 1}"  # in the order of numbers
    assert _extension._load_cpp(folder).error == f"built for torch {both}, this is torch {torch.__version__}"
    found = _diagnosis.missing("_C", NOT_FOUND, folder)
    supported = f"torch {MAJOR}.{MINOR + 1}"  # what may be installed instead
    assert found.cause == f"the kernels were built for {supported}, and this is torch {torch.__version__}"
    assert found.remedy.startswith("install one of these, or build them, ")


def test_a_torch_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named by whoever may be asked: the install, the diagnosis and show_config()."""
    (listed,) = re.findall(r'"torch>=(.*?)"', (ROOT / "pyproject.toml").read_text())
    assert listed == _extension.LEAST_TORCH
    for name in ("torch", "pybind11"):
        (tmp_path / "modules" / name).mkdir(parents=True)
        (tmp_path / "modules" / name / "__init__.py").write_text('__version__ = "2.9.1+cpu"\n')
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    for name in ("MTLKERNELS_PURE", "MTLKERNELS_PREBUILT"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert f"installing without mtlkernels._C: torch 2.9.1+cpu is older than {listed}\n" in done.stderr
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    found = _diagnosis.missing("_C", NOT_FOUND, package(tmp_path, None, f"lib/torch{MAJOR}_11/libmtlkernels.so"))
    assert found.cause == f"torch 2.9.1+cpu is older than {listed}"
    assert found.remedy.startswith(f"install torch {listed} or later, then build them, ")
    line = f"torch      2.9.1+cpu, which is not supported: it is older than {listed}"
    assert line in mk.show_config().splitlines()


def test_only_the_packages_own_kernels_are_loaded(tmp_path: Path) -> None:
    """An editable install would find the module of its checkout for any package of the name."""
    assert _extension._load_cpp(package(tmp_path)) == MISSING


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    assert FILE in str(_extension._load_cpp(package(tmp_path, None, FILE)).error)


@requires.cpp_kernels
def test_without_a_module_for_this_python(tmp_path: Path) -> None:
    folder = package(tmp_path)
    (folder / FILE).parent.mkdir(parents=True)
    (folder / FILE).symlink_to(str(_extension.operator_library()))
    (folder / FILE).with_name("_C.cpython-39-x86_64-linux-gnu.so").touch()
    found = _extension._load_cpp(folder)
    assert found.library == folder / FILE and found.module is None
    assert found.module_error == "not built for this Python"


def test_cuda_built_for_another_python(tmp_path: Path) -> None:
    folder = package(tmp_path, None, "_cuda.cpython-39-x86_64-linux-gnu.so")
    found = _diagnosis.missing("_cuda", NOT_FOUND, folder)
    assert found.cause.startswith("_cuda.cpython-39-x86_64-linux-gnu.so is built for another Python than this ")


def test_a_library_that_is_missing(tmp_path: Path) -> None:
    error = "libgomp.so.1: cannot open shared object file: No such file or directory"
    found = _diagnosis.missing("_C", error, package(tmp_path, None, FILE))
    assert found.cause == "the kernels need a library that is not here, libgomp.so.1"
    found = _diagnosis.missing("_C", "invalid ELF header", package(tmp_path / "again", None, FILE))
    assert found.cause == "the kernels do not load: invalid ELF header"


@pytest.mark.parametrize("editable", [True, False])
def test_shadowed(tmp_path: Path, editable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = checkout(tmp_path / "here")
    other = package(tmp_path / "other", None, FILE)
    package(tmp_path / "without")
    if editable:
        url = {"url": (tmp_path / "other").as_uri(), "dir_info": {"editable": True}}
        monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [Distribution(tmp_path / "site", url)])
    else:
        monkeypatch.setattr(sys, "path", [str(tmp_path / name) for name in ("here", "without", "other")])
    found = _diagnosis.missing("_C", NOT_FOUND, here)
    shadows = f"the folder {here}, where Python looks first, shadows {other}, which has the kernels"
    assert found.cause == f"{shadows}; here the kernels were never built"
    assert "another working directory" in found.remedy
    assert f"--no-build-isolation -e {tmp_path / 'here'}`" in found.remedy


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = package(tmp_path / "site")
    source = tmp_path / "my source"
    checkout(source)
    commit = {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    elsewhere = {"url": (tmp_path / "gone").as_uri(), "dir_info": {}}
    unknown = "FOLDER` where FOLDER is the one with mtlkernels' source and its `setup.py`"
    cases: list[tuple[Any, str]] = [
        ({"url": source.as_uri(), "dir_info": {}}, f"'{source}'`"),
        (commit, "--force-reinstall --no-deps 'mtlkernels @ git+https://host/x.git@abc'`"),
        (elsewhere, unknown),
        (None, unknown),
    ]
    for url, expected in cases:
        found = Distribution(site.parent, url)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda found=found, **_: [found])
        command = _diagnosis.build_command(site)
        assert command.endswith(f"--no-build-isolation {expected}"), command
        assert command.startswith(f"`{sys.executable} -m pip install ")
    assert _diagnosis.build_command(source / "mtlkernels").endswith(f"--no-build-isolation -e '{source}'`")


def test_tools_are_those_of_the_project() -> None:
    (listed,) = re.findall(r"^build = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert tuple(re.findall(r'"(.*?)"', listed)) == _diagnosis._TOOLS


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_without_a_compiler(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    for there in (True, False):
        monkeypatch.setattr(shutil, "which", lambda name, there=there: name if there else None)
        remedy = _diagnosis.missing(name, NOT_FOUND, folder).remedy
        assert ("apt-get install g++" in remedy) != there
        assert ("nvcc" in remedy) == (name == "_cuda")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _diagnosis.missing(name, NOT_FOUND, folder).remedy == "they are built on Linux only, not on darwin"


NEEDED = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
NEEDED += [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(NEEDED) or not sys.platform.startswith("linux"), reason=f"to build takes {NEEDED}")
def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """A copy of this checkout, built in place; an extension of before does not stay."""
    for name in ("mtlkernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "lib")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho this compiler has a cold\nexit 1\n")
    compiler.chmod(0o755)
    stale = tmp_path / "mtlkernels" / FILE
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    env = {**os.environ, "CXX": str(compiler), "PYTHONPATH": str(tmp_path)}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(build, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not stale.exists()
    show = "import mtlkernels as mk; print(mk.__file__); print(mk.show_config())"
    shown = subprocess.run([sys.executable, "-c", show], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert str(tmp_path) in shown.stdout.splitlines()[0], shown.stderr
    record = json.loads((tmp_path / "mtlkernels" / "_build.json").read_text())["_C"]
    assert record["outcome"] == "failed" and record["torch"] == torch.__version__
    assert "    this compiler has a cold" in record["output"]
    assert "  |     this compiler has a cold" in shown.stdout.splitlines()


def compiled(folder: Path, **record: Any) -> Path:
    """A package in a checkout, with sources, and the record of a build from these."""
    found = checkout(folder)
    (folder / "CMakeLists.txt").touch()
    (found / "operators.txt").write_text("f(Tensor x) -> Tensor")
    for file in ("a.cpp", "cpu/a.h", "cuda/a.cu"):
        (folder / "csrc" / file).parent.mkdir(exist_ok=True)
        (folder / "csrc" / file).write_text(file)
    built = {"outcome": "built", "torch": torch.__version__, "source": _source.digest(folder)}
    (found / "_build.json").write_text(json.dumps({"_C": built | record}))
    return found


@pytest.mark.parametrize("file", ["csrc/a.cpp", "csrc/cpu/a.h", "CMakeLists.txt", "mtlkernels/operators.txt"])
def test_kernels_of_another_source(file: str, tmp_path: Path) -> None:
    folder = compiled(tmp_path)
    assert not _extension.of_another_source(folder)
    before = (tmp_path / file).read_text()
    (tmp_path / file).write_text("another")
    assert _extension.of_another_source(folder)
    (tmp_path / file).write_text(before)
    assert not _extension.of_another_source(folder)


def test_sources_that_come_go_and_change_their_names(tmp_path: Path) -> None:
    folder, own = compiled(tmp_path), tmp_path / "csrc" / "a.cpp"
    own.rename(own.with_name("b.cpp"))
    assert _extension.of_another_source(folder)
    own.with_name("b.cpp").rename(own)
    (own.parent / "b.cpp").touch()
    assert _extension.of_another_source(folder)


def test_sources_of_which_nothing_is_known(tmp_path: Path) -> None:
    """Of a record by an earlier version or for another PyTorch, where there are no sources, or where CUDA's changed."""
    folder = compiled(tmp_path / "a")
    (tmp_path / "a" / "csrc" / "cuda" / "a.cu").write_text("another")
    assert not _extension.of_another_source(folder)
    assert not _extension.of_another_source(compiled(tmp_path / "b", torch="2.1.0", source="another"))
    assert _extension.of_another_source(compiled(tmp_path / "c", source="another"))
    assert not _extension.of_another_source(package(tmp_path / "d", {"_C": {"outcome": "built", "source": "another"}}))
    installed = compiled(tmp_path / "e", source="another")
    shutil.rmtree(tmp_path / "e" / "csrc")
    assert not _extension.of_another_source(installed)


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compiled(tmp_path, source="another")

    def refused(path: Path) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert not _extension.of_another_source(folder)


@pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")
def test_it_is_said_where_kernels_are_of_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "another source" not in mk.show_config()
    monkeypatch.setattr(_extension, "of_another_source", lambda: True)
    with pytest.warns(RuntimeWarning, match=r"built from another source than is here now; build them again: `.*pip"):
        _config.warn_of_another_source()
    assert "another source" in mk.show_config()


@pytest.mark.skipif(not _extension.loaded(), reason="there are no C++ kernels")
def test_this_build_is_of_this_source() -> None:
    built = _extension.record("_C")
    assert built.get("source", _source.digest(ROOT)) == _source.digest(ROOT)
