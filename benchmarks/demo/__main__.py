"""``python -m benchmarks.demo``: trains and serves PLE of two libraries as it is and after ``mtlkernels.convert``.

A third part trains deepctr-torch's under PCGrad: as it is with the usual one, and converted with ``mk.optim.PCGrad``.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.demo import flights as data
from benchmarks.demo import model as ple
from benchmarks.demo import surgery
from benchmarks.demo.plot import draw
from benchmarks.demo.progress import Progress
from benchmarks.demo.tables import place, print_losses, print_quality, print_times, speedups
from benchmarks.demo.times import in_turns
from benchmarks.harness.timing import Timing

SIZES = (1, 16, 64, 256, 1024, 4096)
NAMES = BEFORE, AFTER = "as it is", "converted"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    # So many that the whole demo ends within five minutes on two cores.
    parser.add_argument(
        "--rows", type=int, default=200_000, metavar="N", help="flights of 336,776, evenly over the year (200,000)"
    )
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the training period (1)")
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="rows of a training batch (1024)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="B", help="batch sizes to time")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="training steps under PCGrad (100)")
    parser.add_argument("--seconds", type=float, default=1.2, metavar="S", help="for each row of timings (1.2)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the plots (demo-out)")
    found = parser.parse_args(argv)
    for name in ("epochs", "batch", "steps", "rows"):
        if getattr(found, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(found, name)}")
    if min(found.sizes) < 1:
        parser.error(f"--sizes must be at least 1, got {min(found.sizes)}")
    return found


def time_steps(
    before: Any, after: Any, features: Tensor, labels: Tensor, sizes: Sequence[int], seconds: float, fewest: int = 1
) -> dict[str, dict[int, dict[str, Timing]]]:
    """Training, of at least ``fewest`` rows, and serving -> batch size -> the time of both models' steps, in turns."""
    models = {BEFORE: copy.deepcopy(before), AFTER: copy.deepcopy(after)}
    steps = {name: ple.training_step(model, ple.TIMED_RATE) for name, model in models.items()}
    large = [size for size in sizes if size >= fewest]
    training = in_turns(steps, (features, labels), large, seconds)
    for model in models.values():
        model.eval()
    with torch.no_grad():
        return {"training": training, "serving": in_turns(models, (features,), sizes, seconds)}


def run(client: ple.Client, flights: data.Flights, options: argparse.Namespace) -> str:
    """Trains, serves and times one library's model as it is and converted; what came out, in short."""
    before, after = client.build(flights), client.build(flights)
    features, labels = ple.tensors(before, flights)
    train, test = slice(0, flights.train), slice(flights.train, None)
    size = sum(p.numel() for p in before.parameters())
    print(f"\n=== {client.label}: {size:,} parameters, {len(data.TASKS)} tasks\n\nmtlkernels.convert(model) says")
    for line in str(mk.convert(after)).splitlines():
        print(f"  {line}")

    print(f"\nTraining: epochs {options.epochs}, batch size {options.batch}; the same seed and batches for both")
    losses, seconds = {}, {}
    total = options.epochs * -(-flights.train // options.batch)
    for name, model in ((BEFORE, before), (AFTER, after)):
        began = time.perf_counter()
        progress = Progress(name, total)
        order = ple.batches(flights.train, options.epochs, options.batch)
        losses[name] = ple.train(ple.training_step(model), features[train], labels[train], order, progress)
        seconds[name] = time.perf_counter() - began
    print_losses(NAMES, losses[BEFORE], losses[AFTER])

    predictions = {name: ple.predict(model, features[test]) for name, model in ((BEFORE, before), (AFTER, after))}
    quality = {name: ple.aucs(found, labels[test]) for name, found in predictions.items()}
    print_quality(NAMES, quality[BEFORE], quality[AFTER], labels[test])
    served = copy.deepcopy(before)
    mk.convert(served)
    same_weights = (ple.predict(served, features[test]) - predictions[BEFORE]).abs().max().item()
    trained = (predictions[AFTER] - predictions[BEFORE]).abs().max().item()
    print("\nLargest difference between two predicted probabilities in the test period")
    print(f"  the trained model before and after convert   {same_weights:.1e}")
    # A training that starts one rounding away from another ends as far from it.
    print(f"  the two models, each trained by itself       {trained:.1e}  (rounding, which {total} steps amplify)")

    sizes = (options.sizes, options.seconds, client.fewest)
    print("\nTiming both models in turns ...")
    times = time_steps(before, after, features[train], labels[train], *sizes)
    print_times(NAMES, "Time of a training step (forward, backward, Adam", times["training"])
    print_times(NAMES, "Time of a serving step (forward", times["serving"])
    faster = {name: speedups(NAMES, rows) for name, rows in times.items()}
    path = options.out / f"demo-{client.name}.png"
    draw(path, client.label, (losses[BEFORE], losses[AFTER]), faster, place())

    worst = max(abs(a - b) for a, b in zip(quality[BEFORE], quality[AFTER], strict=True))
    # From the timings that took turns: one training after the other also shows what else the machine was doing.
    trains, serves = (f"{min(found.values()):.2f} to {max(found.values()):.2f}" for found in faster.values())
    return (
        f"{client.label} serves {serves} times as fast and trains {trains} times as fast. Training took"
        f" {seconds[BEFORE]:.0f} s\nas it is and {seconds[AFTER]:.0f} s converted; the test AUCs of the two differ by"
        f" {worst:.1g} at most. The plot is {path}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo."""
    options = arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe too, a line is seen when it is printed
    start = time.perf_counter()
    print(f"Machine: {place()}")
    flights = data.load(options.rows)
    tested = len(flights.labels) - flights.train
    print(f"Data: {flights.train:,} flights from January to October 2013 to train, {tested:,} after to test")
    options.out.mkdir(parents=True, exist_ok=True)
    found = [run(client, flights, options) for client in ple.CLIENTS]
    found.append(surgery.run(flights, options.steps, options.batch, options.seconds, options.out))
    print("\nIn short, after the one line mtlkernels.convert(model), from the slowest to the fastest batch size")
    print("(a number below 1 means that the converted model is slower):")
    print("\n".join(found))
    print(f"All of this took {time.perf_counter() - start:.0f} s.")
    print("\nYour own model: print(mtlkernels.convert(model)) says what it can do; docs/recipes/index.md has more.")


if __name__ == "__main__":
    main()
