"""A converted model of torch-rechub leaves Python: ``torch.export`` with a dynamic batch, packaged by AOTInductor.

The package holds the fused operators, so whoever loads it loads mtlkernels first: ``import mtlkernels`` in Python, its
shared library in C++. AOTInductor calls a C++ compiler, which takes most of the time here.

Run: python examples/export_aot.py --out model.pt2

On an AMD EPYC (Zen 4), 2 cores, with `--both`: a request of 1 row takes 3.33 ms as the library has it, 1.36 ms
packaged, 1.50 ms converted, and 0.44 ms converted and packaged (7.6 times as fast); of 64 rows 7.90, 4.45, 3.77 and
2.21 ms (3.6); of 1024 rows 51.4, 30.6, 27.1 and 25.7 ms (2.0).
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch._inductor.codecache  # which PyTorch 2.10 wants before it loads a package, and does not import
from common import arguments, print_times
from convert_rechub import Trainer
from rechub import by_name, click_data, rechub_ple
from torch import Tensor, nn

import mtlkernels as mk


class Served(nn.Module):
    """A model of torch-rechub, which takes a dictionary of columns, as a function of two tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """codes [B, 10] of int64, numbers [B, 16] of float32 → probabilities [B, 2]."""
        return self.model(by_name(codes, numbers))


def train(steps: int, rows: int) -> Served:
    """torch-rechub's PLE after so many steps, in evaluation mode."""
    model = rechub_ple()
    trainer = Trainer(model)
    for batch in zip(*(part.split(rows) for part in click_data(steps * rows)), strict=True):
        trainer.step(*batch)
    return Served(model.eval())


def export(path: str | Path, model: Served | None = None) -> Served:
    """Writes a package that takes any number of rows; returns the model that is in it.

    Args:
        path: of the package, which ends in ".pt2".
        model: by default torch-rechub's PLE after 20 steps and ``mk.convert``.
    """
    if model is None:
        model = train(20, 512)
        mk.convert(model)
    codes, numbers, _ = click_data(16)
    rows = torch.export.Dim("rows", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (codes, numbers), dynamic_shapes=({0: rows}, {0: rows}))
    # What is made of weights alone, such as batch norms folded into them, is made when the package is loaded.
    once = {"aot_inductor.use_runtime_constant_folding": True}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=once)
    return model


def main() -> None:
    parser = arguments(__doc__, steps=20, rows=512)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--out", type=Path, help="keep the package here")
    kept.add_argument(
        "--package", type=Path, help="take this one, which an earlier run of as many steps and rows has kept"
    )
    parser.add_argument("--both", action="store_true", help="package the library's own code too, to compare")
    options = parser.parse_args()
    own = train(options.steps, options.rows)
    converted = copy.deepcopy(own)
    print(mk.convert(converted))
    ways = {"as it is": own, "converted": converted}
    with tempfile.TemporaryDirectory() as folder:
        path = options.package or options.out or Path(folder, "model.pt2")
        if not options.package:
            export(path, converted)
        ways["converted, packaged"] = torch._inductor.aoti_load_package(str(path))
        print(f"\n{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
        if options.both:
            export(Path(folder, "own.pt2"), own)
            ways["as it is, packaged"] = torch._inductor.aoti_load_package(str(Path(folder, "own.pt2")))

        with torch.no_grad():
            for rows in (1, 64, 1024):
                request = click_data(rows, seed=1)[:2]
                apart = (ways["converted, packaged"](*request) - own(*request)).abs().max()
                calls = {name: partial(way, *request) for name, way in ways.items()}
                print_times(f"A request of {rows} rows", calls, options.rounds)
                print(f"  largest difference between package and library: {apart:.1e}")


if __name__ == "__main__":
    main()
