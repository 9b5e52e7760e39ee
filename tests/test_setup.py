"""What setup.py does beside compiling: which folders of CMake's it keeps, what it packs, and what the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools import Distribution, Extension

import setup
from release import wheel

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has asked for anything."""
    for name in (*setup.READ_ONCE, "CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What setup.py and release/wheel.py run; of CMake the folder alone comes of it."""
    found: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        found.append(command)
        if "-B" in command:
            Path(command[command.index("-B") + 1]).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "options_for_cpp", lambda: [])
    monkeypatch.setattr(wheel, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
    return found


def configure(place: Path) -> Path:
    """Lets setup.py build for an install into a place; the folder that CMake works in."""
    command = setup.CMakeBuild(Distribution({"name": "mtlkernels"}))
    command.build_lib = str(place)
    command.extensions = []
    command.finalize_options()
    command.run_cmake(Extension(setup.cpp(), []))
    (folder,) = (setup.ROOT / "build").glob("cmake-*")
    return folder


def test_a_library_that_is_in_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has it loaded reads the old file, as one that is written over crashes it."""
    command = setup.CMakeBuild(Distribution({"name": "mtlkernels"}))
    command.build_lib = str(tmp_path / "built")
    command.extensions = [Extension("package.lib._C", [])]
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / "in_place" / "_C.so"), raising=False)
    monkeypatch.setattr(setup.build_ext, "copy_extensions_to_source", lambda self: None)
    built, in_place = tmp_path / "built" / "package" / "lib", tmp_path / "in_place"
    built.mkdir(parents=True)
    (built / setup.LIBRARY).write_text("old")
    command.copy_extensions_to_source()
    with open(in_place / setup.LIBRARY) as loaded:
        (built / setup.LIBRARY).write_text("new")
        command.copy_extensions_to_source()
        assert loaded.read() == "old"
    assert (in_place / setup.LIBRARY).read_text() == "new"
    assert [path.name for path in in_place.iterdir()] == [setup.LIBRARY]


CHANGES = [("CMAKE_ARGS", "-DMTLK_SPLIT=ON"), *((name, "another") for name in setup.READ_ONCE)]


@pytest.mark.parametrize("name, value", CHANGES)
def test_nothing_of_another_configuration_stays(
    name: str, value: str, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CMake keeps options and the compiler in its folder: what is asked for is heard, and what no longer is, too."""
    cache = configure(tmp_path) / "CMakeCache.txt"
    cache.touch()
    monkeypatch.setenv(name, value)
    configure(tmp_path)
    assert not cache.exists()
    cache.touch()
    monkeypatch.delenv(name)
    configure(tmp_path)
    assert not cache.exists()


def test_what_was_compiled_is_kept(commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same environment, for another place to install to and by another name of Python."""
    monkeypatch.setenv("CMAKE_ARGS", "-DMTLK_SPLIT=ON")
    monkeypatch.setenv("CXX", "clang++")
    cache = configure(tmp_path / "one") / "CMakeCache.txt"
    cache.touch()
    monkeypatch.setattr(sys, "executable", f"{sys.executable}3")
    configure(tmp_path / "other")
    assert cache.exists()
    configured = [command for command in commands if "-S" in command]
    assert [command[-1] for command in configured] == ["-DMTLK_SPLIT=ON"] * 2
    for command, place in zip(configured, ("one", "other"), strict=True):
        assert any(part.startswith(f"-DCMAKE_INSTALL_PREFIX={tmp_path / place}/") for part in command)


def test_folders_of_a_wheel(commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = wheel.cmake(tmp_path / "kernels", "kernels", "-DMTLK_MODULE=OFF") / "CMakeCache.txt"
    cache.touch()
    wheel.cmake(tmp_path / "kernels", "kernels", "-DMTLK_MODULE=OFF")
    assert cache.exists() and commands[0] == commands[2] and "-DMTLK_MODULE=OFF" in commands[0]
    monkeypatch.setenv("CXX", "g++-12")
    wheel.cmake(tmp_path / "kernels", "kernels", "-DMTLK_MODULE=OFF")
    assert not cache.exists()


def test_modules_that_are_gone(tmp_path: Path) -> None:
    """They are not packed, nor are files of data and kernels that this build does not make."""
    package = tmp_path / "built" / "mtlkernels"
    left = ("gone.py", "ops/gone/__init__.py", "ops/gone/__pycache__/a.pyc", "gone.txt")
    left += ("lib/torch2_13/libmtlkernels.so", "_cuda.cpython-311-x86_64-linux-gnu.so")
    kept = ("_build.json",)
    for name in (*left, *kept):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("of an earlier build")
    (tmp_path / "mtlkernels" / "ops").mkdir(parents=True)
    for name in ("__init__.py", "ops/__init__.py", "py.typed"):
        (tmp_path / "mtlkernels" / name).touch()
    (tmp_path / "mtlkernels" / "__init__.py").write_text('__version__ = "1"\n')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    env = {**os.environ, "MTLKERNELS_PURE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert found == {"__init__.py", "ops/__init__.py", "py.typed", *kept}


def test_kernels_of_another_build(tmp_path: Path) -> None:
    """They may be of another source; this build's own are made again where they have to be."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    kept = [f"lib/torch2_13/_C{suffix}", "lib/torch2_13/libmtlkernels.so", f"_cuda{suffix}"]
    left = ["lib/torch2_12/libmtlkernels.so", "lib/torch2_13/_C.cpython-399-x86_64-linux-gnu.so", "_cuda.other.so"]
    for name in (*kept, *left):
        (tmp_path / "mtlkernels" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mtlkernels" / name).touch()
    extensions = [Extension(name, []) for name in ("mtlkernels.lib.torch2_13._C", setup.CUDA)]
    command = setup.SourcesOnly(Distribution({"name": "mtlkernels", "ext_modules": extensions}))
    command.build_lib = str(tmp_path)
    command.get_outputs = lambda include_bytecode: []  # type: ignore[method-assign]
    command.remove_what_is_gone()
    package = tmp_path / "mtlkernels"
    assert {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()} == set(kept)


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to files of the repository become their text; code, and links that lead somewhere, stay."""
    readme = (
        "# title\n\nof [two\nlines](docs/a.md) and [`code`](LICENSE), see [there](https://example.org/a) and\n"
        "[below](#more), a list[int] (of two)\n\n![picture](a/b.png)\n\n![far](https://example.org/b.png)\n\n"
        "<!-- run\nx[0](1)\n-->\n\n```python\nf[0](x)\n```\n\n| [a](docs/a.md) | [b](docs/b.md#c) |\n"
    )
    page = (
        "of two\nlines and `code`, see [there](https://example.org/a) and\n"
        "[below](#more), a list[int] (of two)\n\n![far](https://example.org/b.png)\n\n"
        "<!-- run\nx[0](1)\n-->\n\n```python\nf[0](x)\n```\n\n| a | b |\n"
    )
    (tmp_path / "README.md").write_text(readme)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    title, note, rest = setup.page().split("\n\n", 2)
    assert title == "# title" and note.startswith("*The README of the repository") and rest == page


def test_a_setuptools_that_is_too_old(tmp_path: Path) -> None:
    """As an environment that was just made may have: pip asks for no other where it does not isolate the build."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nCommand = Extension = setup = None\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode and "setuptools 77.0.3 or later, here is 65.5.0" in found.stderr


@pytest.mark.parametrize(("version", "is_older"), [("2.9.1", True), ("2.10.0+cpu", False), ("3.0.0a0+git1", False)])
def test_versions_of_torch_are_numbers(version: str, is_older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert setup.older_torch() == (f"torch {version} is older than 2.10" if is_older else None)


@pytest.mark.parametrize("of_cuda", [False, True])
def test_a_build_that_failed_takes_its_own_libraries_away(
    of_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernels' failure leaves those for CPUs, and the operators' library beside them."""
    command = setup.CMakeBuild(Distribution({"name": "mtlkernels"}))
    monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / f"{name}.so"), raising=False)
    own, library, cpp = tmp_path / f"{setup.CUDA}.so", tmp_path / setup.LIBRARY, tmp_path / f"{setup.cpp()}.so"
    for path in (own, library, cpp):
        path.touch()
    command.remove(setup.CUDA if of_cuda else setup.cpp())
    assert set(tmp_path.iterdir()) == ({library, cpp} if of_cuda else {own})


@pytest.mark.parametrize("there", [False, True])
def test_an_earlier_outcome_goes_with_its_library(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped, built = {"outcome": "skipped", "reason": "ninja is not on the PATH"}, {"outcome": "built"}
    monkeypatch.setattr(setup, "outcomes", {"_C": skipped})
    (tmp_path / setup.RECORD).write_text(json.dumps({"_C": built}))
    if there:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    setup.write_record(tmp_path)
    assert json.loads((tmp_path / setup.RECORD).read_text()) == {"_C": built if there else skipped}
