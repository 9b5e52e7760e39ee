"""Builds what a user installs without a compiler: a wheel for several PyTorches and Pythons, of Linux on x86-64.

Beside it a wheel of the reference alone, for any other system.

``make wheel`` runs it. The kernels are compiled once, the operators once for each minor version of PyTorch, since they
use more of its C++ interface than the stable part (nodes of autograd's graph, versions of tensors, threads), and the
direct way from Python once for each pair. mtlkernels/_extension.py picks among them. auditwheel checks that the wheel
runs where glibc is 2.28 or later, which is what PyTorch's own wheels ask for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from release.interpreters import interpreter
from release.sdk import Sdk, sdk
from setup import keep_if_the_same

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
TORCHES = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORM = "manylinux_2_28_x86_64"
# Of the system or of PyTorch, which has them loaded: a second copy of OpenMP would have threads of its own.
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so.1", "libmtlkernels.so")


def cmake(build: Path, target: str, *options: str) -> Path:
    """Configures and builds; the folder with what was built."""
    asked = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DMTLK_PORTABLE=ON"]
    asked += ["-DCMAKE_SHARED_LINKER_FLAGS=-s", "-DCMAKE_MODULE_LINKER_FLAGS=-s", *options]
    keep_if_the_same(build, asked)
    subprocess.run(["cmake", *asked], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)
    return build


def build_all(sdks: list[Sdk], pythons: dict[str, str], library: Path) -> None:
    """Fills ``library``, the package's folder lib."""
    import pybind11

    first = sdks[0]
    kernels = cmake(WORK / "kernels", "kernels", *first.options, "-DMTLK_MODULE=OFF") / "libkernels.a"
    for torch in sdks:
        place = library / f"torch{torch.version.replace('.', '_')}"
        place.mkdir(parents=True)
        own = [*torch.options, f"-DMTLK_KERNELS={kernels}", "-DMTLK_MODULE=OFF"]
        operators = cmake(WORK / f"operators-{torch.version}", "operators", *own) / "libmtlkernels.so"
        shutil.copy(operators, place)
        for version, python in pythons.items():
            own = [*torch.options, f"-DMTLK_LIBRARY={operators}", f"-DPython_EXECUTABLE={python}"]
            own += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            build = cmake(WORK / f"module-{torch.version}-{version}", "_C", *own)
            (module,) = build.glob("_C.*.so")
            shutil.copy(module, place)


def interpreters(versions: list[str]) -> dict[str, str]:
    """Those of the Pythons that are here with their headers; what is left out is said."""
    found = {version: interpreter(version) for version in versions}
    for version, python in found.items():
        if isinstance(python, str):
            print(f"{python}: with Python {version} the operators are there without the direct way")
    return {version: str(python) for version, python in found.items() if isinstance(python, Path)}


def source() -> Path:
    """The folder that the source distribution unpacks to, in which nothing was built before."""
    folder = WORK / "source"
    shutil.rmtree(folder, ignore_errors=True)
    sdist = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(sdist, cwd=ROOT, check=True)
    (packed,) = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


def pip_wheel(out: Path, **variables: str) -> Path:
    """A wheel of the source distribution, as setup.py makes it with these variables of the environment."""
    shutil.rmtree(out, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", str(out), str(source())]
    subprocess.run(command, check=True, env={**os.environ, **variables})
    (wheel,) = out.glob("*.whl")
    return wheel


def assemble(library: Path) -> Path:
    """The wheel of the package with ``library`` in it, as auditwheel has passed it."""
    out = WORK / "passed"
    shutil.rmtree(out, ignore_errors=True)
    wheel = pip_wheel(WORK / "raw", MTLKERNELS_PREBUILT=str(library))
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--wheel-dir", str(out)]
    command = [*repair, *(f"--exclude={name}" for name in EXCLUDED), str(wheel)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"auditwheel does not pass {wheel}:\n{done.stdout}")
    (passed,) = out.glob(f"*{PLATFORM}.whl")
    if grafted := sorted(set(libraries(passed)) - set(libraries(wheel))):
        raise SystemExit(f"auditwheel had to add {', '.join(grafted)}: the wheel would bring a library of its own")
    return passed


def libraries(wheel: Path) -> list[str]:
    """The shared libraries in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".so" in name]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make wheel ARGS=...", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=list(TORCHES), metavar="MINOR")
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), metavar="MINOR")
    parser.add_argument(
        "--sdk", type=Path, default=WORK / "sdk", help="where headers and libraries of PyTorch are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, but {options.out} is a file")
    options.out.mkdir(parents=True, exist_ok=True)
    pythons = interpreters(options.python)
    sdks = [sdk(version, options.sdk) for version in options.torch]
    library = WORK / "lib"
    shutil.rmtree(library, ignore_errors=True)
    build_all(sdks, pythons, library)
    made = [pip_wheel(WORK / "pure", MTLKERNELS_PURE="1"), assemble(library)]
    for earlier in options.out.glob("mtlkernels-*.whl"):
        earlier.unlink()
    pure, wheel = (Path(shutil.copy(file, options.out)) for file in made)
    print(f"{pure}: the reference alone, for other systems")
    print(
        f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, for torch {', '.join(options.torch)} and the direct way "
        f"from Python {', '.join(pythons)}"
    )


if __name__ == "__main__":
    main()
