"""What is packed for others: the source distribution, and the wheel of a release."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from release import sdk, wheel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this one without what was built in it, since what packs it leaves files behind."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "lib", "_build.json")
    for name in ("mtlkernels", "csrc", "examples"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    return tmp_path / "checkout"


def test_source_distribution(checkout: Path, tmp_path: Path) -> None:
    """It has all that a build takes."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (packed,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    for folder in ("mtlkernels", "csrc", "examples"):
        for path in (checkout / folder).rglob("*"):
            assert path.is_dir() or str(path.relative_to(checkout)) in names, path
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names


def packed_wheel(checkout: Path, out: Path, **variables: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--wheel-dir", str(out), str(checkout)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (packed,) = out.glob("*.whl")
    return packed


def test_a_wheel_for_every_system(checkout: Path, tmp_path: Path) -> None:
    packed = packed_wheel(checkout, tmp_path / "dist", MTLKERNELS_PURE="1")
    assert packed.name.endswith("-py3-none-any.whl") and wheel.libraries(packed) == []
    with zipfile.ZipFile(packed) as archive:
        assert "this is the wheel without kernels" in archive.read("mtlkernels/_build.json").decode()


def test_a_wheel_for_every_python(checkout: Path, tmp_path: Path) -> None:
    """Of kernels that were built before: they are in it as they are, and it is of no version of Python."""
    built = tmp_path / "lib" / "torch2_99"
    built.mkdir(parents=True)
    (built / "libmtlkernels.so").write_bytes(b"kernels")
    packed = packed_wheel(checkout, tmp_path / "dist", MTLKERNELS_PREBUILT=str(tmp_path / "lib"))
    assert "-py3-none-" in packed.name and not packed.name.endswith("-any.whl")
    assert wheel.libraries(packed) == ["mtlkernels/lib/torch2_99/libmtlkernels.so"]
    with zipfile.ZipFile(packed) as archive:
        assert "mtlkernels/operators.txt" in archive.namelist()
        assert archive.read("mtlkernels/lib/torch2_99/libmtlkernels.so") == b"kernels"


def test_what_is_kept_of_a_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(version: str, folder: Path) -> Path:
        folder.mkdir()
        with zipfile.ZipFile(folder / "torch-2.13.1-cp311.whl", "w") as archive:
            for name in ("version.py", "include/torch/library.h", "lib/libc10.so", "lib/libtorch_cuda.so", "nn/a.py"):
                archive.writestr(f"torch/{name}", "__version__ = '2.13.1+cpu'\n")
        return folder / "torch-2.13.1-cp311.whl"

    monkeypatch.setattr(sdk, "_download", download)
    found = sdk.sdk("2.13", tmp_path)
    kept = sorted(str(path.relative_to(found.folder)) for path in found.folder.rglob("*") if path.is_file())
    assert kept == ["torch/include/torch/library.h", "torch/lib/libc10.so", "torch/version.py"]
    assert f"-DTORCH_LIBRARY_DIRS={found.folder / 'torch' / 'lib'}" in found.options
    monkeypatch.setattr(sdk, "_download", lambda *_: pytest.fail("it is there"))
    assert sdk.sdk("2.13", tmp_path) == found
    (tmp_path / "torch-2.13").rename(tmp_path / "torch-2.12")
    with pytest.raises(SystemExit, match="is not of torch 2.12"):
        sdk.sdk("2.12", tmp_path)
