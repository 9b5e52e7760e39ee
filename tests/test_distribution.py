"""What is packed for others: the source distribution, and the wheel of a release."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mtlkernels as mk
from release import sdk, tag, wheel

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
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


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
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in metadata and "\n# mtlkernels\n" in metadata
    targets = re.findall(r"\]\(([^)]*)\)", metadata)
    assert [target for target in targets if not target.startswith("https://")] == []


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


@pytest.fixture
def making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``release.wheel`` with nothing that compiles, downloads or packs: auditwheel passes what ``passed`` names."""
    passed = ["mtlkernels-2-py3-none-manylinux_2_28_x86_64.whl"]

    def pip_wheel(out: Path, **variables: str) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        packed = out / f"mtlkernels-2-py3-none-{'any' if 'MTLKERNELS_PURE' in variables else 'linux_x86_64'}.whl"
        zipfile.ZipFile(packed, "w").close()
        return packed

    def auditwheel(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        out = Path(command[command.index("--wheel-dir") + 1])
        out.mkdir(parents=True, exist_ok=True)
        for name in passed:
            zipfile.ZipFile(out / name, "w").close()
        return subprocess.CompletedProcess(command, int(not passed), stdout="" if passed else "it is not portable")

    monkeypatch.setattr(wheel, "WORK", tmp_path / "work")
    monkeypatch.setattr(wheel, "sdk", lambda version, cache: sdk.Sdk(version, cache))
    monkeypatch.setattr(wheel, "interpreters", lambda versions: {})
    monkeypatch.setattr(wheel, "build_all", lambda *_: None)
    monkeypatch.setattr(wheel, "pip_wheel", pip_wheel)
    monkeypatch.setattr(subprocess, "run", auditwheel)
    return passed


def test_wheels_go_to_a_folder_that_is_not_there_yet(making: list[str], tmp_path: Path) -> None:
    out = tmp_path / "some" / "dist"
    wheel.main(["--out", str(out)])
    assert {path.name for path in out.iterdir()} == {"mtlkernels-2-py3-none-any.whl", *making}


def test_earlier_wheels_go_when_there_are_new_ones(making: list[str], tmp_path: Path) -> None:
    for name in ("mtlkernels-1-py3-none-any.whl", "mtlkernels-1-py3-none-manylinux_2_28_x86_64.whl"):
        (tmp_path / name).touch()
    earlier = {path.name for path in tmp_path.glob("*.whl")}
    made = making.pop()
    with pytest.raises(SystemExit, match="it is not portable"):
        wheel.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.whl")} == earlier
    making.append(made)
    wheel.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.whl")} == {"mtlkernels-2-py3-none-any.whl", made}


def test_wheels_into_a_file(making: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dist").touch()
    with pytest.raises(SystemExit, match="2"):
        wheel.main(["--out", str(tmp_path / "dist")])
    assert f"--out must be a folder, but {tmp_path / 'dist'} is a file" in capsys.readouterr().err


def test_a_tag_that_is_not_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert tag.main([f"v{mk.__version__}"]) == 0
    assert capsys.readouterr().err == ""
    for other in ("v0.0.9", mk.__version__, f"v{mk.__version__}.1"):
        assert tag.main([other]) == 1
        own = mk.__version__
        said = f"the tag must be v{own}, as mtlkernels.__version__ is {own}, got {other}\n"
        assert capsys.readouterr().err == said


def test_what_the_release_runs() -> None:
    """The tag is looked at before anything is built, and Python's own interpreter is asked for nothing but that."""
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    commands = re.findall(r"^ *- run: (.+)$", workflow, flags=re.MULTILINE)
    assert commands[0] == 'python3 -m release.tag "$GITHUB_REF_NAME"'
    assert not any(command.startswith("python") for command in commands[1:])
    assert commands.index(".venv/bin/python setup.py sdist") > commands.index("make wheel")
