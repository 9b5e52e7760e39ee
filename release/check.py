"""Tries the wheel in fresh environments, as a user would who has no compiler: one a pair of Python and PyTorch.

``make wheel-check`` runs it, after ``make wheel``. In each environment, with nothing of this machine on the PATH: the
wheel installs, ``python -m mtlkernels`` holds every operator against the reference, and a model of torch-rechub is
converted and trained. With ``--serving``, a C++ program then serves that model; to package it takes a compiler.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from release.interpreters import environment, interpreter

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ("3.10:2.11", "3.11:2.13", "3.13:2.15")
RECHUB = "torch-rechub==0.9.0"


class Failed(Exception):
    """A step ended with an error, and what it printed."""


def run(*command: str | Path, cwd: Path, path: str | None = None) -> str:
    """What a command prints; with ``path``, it finds programs there alone."""
    env = environment() if path is None else environment(PATH=path)
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}:\n{done.stdout}")
    return done.stdout


def check(python: Path, torch: str, wheel: Path, folder: Path, serving: bool) -> None:
    """Raises Failed with the step that did not succeed."""
    run(python, "-m", "venv", folder / "env", cwd=folder)
    own, alone = folder / "env" / "bin" / "python", str(folder / "env" / "bin")
    pip = (own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, f"torch=={torch}.*", cwd=folder)
    start = time.monotonic()
    run(*pip, "--no-deps", wheel, cwd=folder, path=alone)
    print(f"  installed in {time.monotonic() - start:.1f} s", flush=True)
    run(*pip, RECHUB, cwd=folder)
    lines = run(own, "-m", "mtlkernels", cwd=folder, path=alone).splitlines()
    print(*(f"  {line}" for line in lines), sep="\n", flush=True)
    (extension,) = [line for line in lines if line.startswith("extension ")]
    if f"torch {torch}." not in extension:
        raise Failed(f"the kernels and the direct way for torch {torch} are wanted, not: {extension}")
    run(own, ROOT / "examples" / "convert_rechub.py", "--steps", "4", "--rounds", "2", cwd=folder, path=alone)
    print("  converts and trains torch-rechub's PLE", flush=True)
    if serving:
        run(*pip, "cmake", "ninja", cwd=folder)
        with_compiler = os.pathsep.join([alone, environment()["PATH"]])
        served = run(own, ROOT / "examples" / "serving" / "run.py", cwd=folder, path=with_compiler)
        print(*(f"  {line}" for line in served.splitlines()), sep="\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make wheel-check ARGS=...", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="PYTHON:TORCH")
    parser.add_argument("--wheel", type=Path, help="by default the one in dist")
    parser.add_argument("--serving", action="store_true", help="serve the model by a C++ program too")
    options = parser.parse_args(arguments)
    wheel = options.wheel or next((ROOT / "dist").glob("mtlkernels-*manylinux*.whl"), None)
    if wheel is None:
        parser.error("there is no wheel in dist: run make wheel")
    failures = 0
    for pair in options.pairs:
        version, torch = pair.split(":")
        print(f"Python {version}, torch {torch}", flush=True)
        python = interpreter(version)
        if isinstance(python, str):
            print(f"  not run: {python}")
            failures += 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(python, torch, wheel.resolve(), Path(folder), options.serving)
            except Failed as failure:
                failures += 1
                print(f"  FAILED: {failure}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
