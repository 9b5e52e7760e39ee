"""A converted model of torch-rechub served by a C++ program that has no Python in it: same numbers, and its latency.

Trains and converts the model, packages it by AOTInductor and, with the library's own code, as TorchScript; builds
serve.cpp, has it answer requests of several sizes, and holds the answers against the model's own.

Run: python examples/serving/run.py (a C++ compiler, cmake and ninja must be there)

On an AMD EPYC (Zen 4), 2 cores, a request of 1, 16 and 256 rows takes 0.11, 0.44 and 7.0 ms by the program and the
package, 0.98, 2.1 and 13.6 ms by the program and TorchScript, 0.24, 0.58 and 7.5 ms by the package in Python, and 1.4,
2.0 and 9.6 ms by the converted model in Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import medians  # noqa: E402
from export_aot import export  # noqa: E402
from rechub import click_data  # noqa: E402

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """The program, built against the PyTorch that runs this."""
    configure = ["cmake", "-S", str(HERE), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DTORCH={Path(torch.__file__).parent}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
    return folder / "serve"


def serve(program: Path, *arguments: Any) -> dict[int, float]:
    """Microseconds by the number of rows, as the program has measured them."""
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {int(rows): float(time) for rows, time in (line.split() for line in done.stdout.splitlines())}


@torch.no_grad()
def check(requests: dict[int, Path], model: nn.Module, name: str) -> None:
    for rows, path in requests.items():
        (answer,) = torch.load(f"{path}.answer")
        apart = float((answer - model(*torch.load(path))).abs().max())
        if not apart < 1e-6:  # of probabilities
            raise SystemExit(f"{name}, {rows} rows: the answer is off by {apart}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep models, requests and the program here")
    options = parser.parse_args()
    library = mk.operator_library()
    if library is None:
        raise SystemExit("this install has no C++ kernels: see print(mtlkernels.show_config())")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = export(folder / "model.pt2")
        torch.jit.trace(model, click_data(2)[:2], check_trace=False).save(str(folder / "model.pt"))
        requests = {rows: folder / f"request-{rows}.pt" for rows in options.rows}
        for rows, path in requests.items():
            torch.save(list(click_data(rows, seed=1)[:2]), path)
        program = build(folder / "build")

        threads = ["--threads", options.threads]
        fused = serve(program, "--operators", library, *threads, folder / "model.pt2", *requests.values())
        check(requests, model, "the package")
        plain = serve(program, *threads, folder / "model.pt", *requests.values())
        check(requests, model, "TorchScript")
        print("the C++ program's answers are the model's own")
        package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
        columns = ("C++, package", "C++, TorchScript", "Python, package", "Python, model")
        print(f"{'rows':>5}", *(f"{name:>18}" for name in columns), "in µs")
        for rows in requests:
            times = in_python({"package": package, "model": model}, click_data(rows, seed=1)[:2])
            found = (fused[rows], plain[rows], times["package"], times["model"])
            print(f"{rows:5}", *(f"{microseconds:18.0f}" for microseconds in found))


@torch.no_grad()
def in_python(ways: dict[str, Any], request: tuple[Tensor, ...]) -> dict[str, float]:
    """Microseconds, each call again and again and by itself, as the program does it."""
    return {name: 1e3 * medians({name: lambda way=way: way(*request)}, 200)[name] for name, way in ways.items()}


if __name__ == "__main__":
    main()
