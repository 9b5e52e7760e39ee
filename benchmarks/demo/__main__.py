"""``python -m benchmarks.demo``: trains and serves PLE of two libraries as it is and after ``mtlkernels.convert``."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.demo import flights as data
from benchmarks.demo import model as ple
from benchmarks.demo.plot import draw
from benchmarks.demo.progress import Progress
from benchmarks.harness import machine
from benchmarks.harness.timing import Budget, Timing, interleaved

SIZES = (1, 16, 64, 256, 1024, 4096)
BEFORE, AFTER = "as it is", "converted"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--rows", type=int, metavar="N", help="flights to use, evenly over the year (all: 336,776)")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the training period (1)")
    parser.add_argument("--batch", type=int, default=1024, metavar="N", help="rows of a training batch (1024)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="B", help="batch sizes to time")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="for each row of timings (1.5)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the plots (demo-out)")
    found = parser.parse_args(argv)
    for name in ("epochs", "batch", *(["rows"] if found.rows is not None else [])):
        if getattr(found, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(found, name)}")
    if min(found.sizes) < 1:
        parser.error(f"--sizes must be at least 1, got {min(found.sizes)}")
    return found


def place() -> str:
    """The machine and what serves the op on it, in a line."""
    here = machine.describe(torch.device("cpu"))
    backend = mk.backends()["expert_mixture"]["cpu"][0]
    threads = torch.get_num_threads()
    return f"{here['cpu']}, {threads} threads, {here['cpu_capability']}, torch {torch.__version__}, backend {backend}"


def call_of(function: Callable[..., object], *args: Tensor) -> Callable[[], None]:
    """The call as the timer wants it, without arguments and result."""

    def call() -> None:
        function(*args)

    return call


def time_steps(
    before: Any, after: Any, features: Tensor, labels: Tensor, sizes: Sequence[int], seconds: float, fewest: int = 1
) -> dict[str, dict[int, dict[str, Timing]]]:
    """Training, of at least ``fewest`` rows, and serving -> batch size -> the time of both models' steps, in turns."""
    budget = Budget(seconds=seconds, warmup=seconds / 15, min_rounds=3)
    times: dict[str, dict[int, dict[str, Timing]]] = {"training": {}, "serving": {}}
    models = {BEFORE: copy.deepcopy(before), AFTER: copy.deepcopy(after)}
    steps = {name: ple.training_step(model) for name, model in models.items()}
    for size in sizes:
        if size < fewest:
            continue
        rows = torch.arange(size) % len(features)
        x, y = features[rows], labels[rows]
        calls = {name: call_of(step, x, y) for name, step in steps.items()}
        times["training"][size] = interleaved(calls, torch.device("cpu"), budget)
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for size in sizes:
            x = features[torch.arange(size) % len(features)]
            calls = {name: call_of(model, x) for name, model in models.items()}
            times["serving"][size] = interleaved(calls, torch.device("cpu"), budget)
    return times


def print_losses(before: Sequence[float], after: Sequence[float]) -> None:
    print("\nTraining loss, mean over each tenth of the steps")
    print(f"  {'steps':>11}  {BEFORE:>10}  {AFTER:>10}  {'difference':>10}")
    edges = sorted({round(len(before) * tenth / 10) for tenth in range(11)})
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        a, b = statistics.fmean(before[start:end]), statistics.fmean(after[start:end])
        print(f"  {f'{start + 1}-{end}':>11}  {a:>10.5f}  {b:>10.5f}  {b - a:>+10.1e}")


def print_quality(before: Sequence[float], after: Sequence[float], labels: Tensor) -> None:
    print("\nArea under the ROC curve in the test period (0.5 is guessing, 1 is perfect)")
    print(f"  {'task':<15}  {'flights':>8}  {'share':>6}  {BEFORE:>10}  {AFTER:>10}")
    for task, name in enumerate(data.TASKS):
        known = labels[:, task][~labels[:, task].isnan()]
        share = f"{100 * known.mean().item():.1f}%"
        print(f"  {name:<15}  {len(known):>8,}  {share:>6}  {before[task]:>10.4f}  {after[task]:>10.4f}")


def print_times(times: dict[str, dict[int, dict[str, Timing]]]) -> None:
    for name, rows in times.items():
        what = "forward, backward, Adam" if name == "training" else "forward"
        print(f"\nTime a step in {name} ({what}; whole model, embeddings and towers included), median ms")
        print(f"  {'rows':>6}  {BEFORE:>10}  {AFTER:>10}  {'faster':>7}")
        for size, row in rows.items():
            a, b = row[BEFORE].median, row[AFTER].median
            print(f"  {size:>6,}  {a:>10.2f}  {b:>10.2f}  {a / b:>6.2f}×")


def run(client: ple.Client, flights: data.Flights, options: argparse.Namespace) -> str:
    """Trains, serves and times one library's model as it is and converted; what came out, in short."""
    before, after = client.build(flights), client.build(flights)
    features, labels = ple.tensors(before, flights)
    train, test = slice(0, flights.train), slice(flights.train, None)
    size = sum(p.numel() for p in before.parameters())
    print(f"\n=== {client.label}: {size:,} parameters, {len(data.TASKS)} tasks\n\nmtlkernels.convert(model) says")
    for line in str(mk.convert(after)).splitlines():
        print(f"  {line}")

    print(f"\nTraining, {options.epochs} epoch(s) of batches of {options.batch}; same seed, same batches")
    losses, seconds = {}, {}
    total = options.epochs * -(-flights.train // options.batch)
    for name, model in ((BEFORE, before), (AFTER, after)):
        began = time.perf_counter()
        progress = Progress(name, total)
        losses[name] = ple.train(model, features[train], labels[train], options.epochs, options.batch, progress)
        seconds[name] = time.perf_counter() - began
    print_losses(losses[BEFORE], losses[AFTER])

    predictions = {name: ple.predict(model, features[test]) for name, model in ((BEFORE, before), (AFTER, after))}
    quality = {name: ple.aucs(found, labels[test]) for name, found in predictions.items()}
    print_quality(quality[BEFORE], quality[AFTER], labels[test])
    served = copy.deepcopy(before)
    mk.convert(served)
    same_weights = (ple.predict(served, features[test]) - predictions[BEFORE]).abs().max().item()
    trained = (predictions[AFTER] - predictions[BEFORE]).abs().max().item()
    print("\nLargest difference of any predicted probability in the test period")
    print(f"  the trained model before and after convert   {same_weights:.1e}")
    # A training that starts one rounding away from another ends as far from it.
    print(f"  the two models, each trained by itself       {trained:.1e}  (rounding, amplified by {total} steps)")

    sizes = (options.sizes, options.seconds, client.fewest)
    times = time_steps(before, after, features[train], labels[train], *sizes)
    print_times(times)
    speedups = {
        name: {size: row[BEFORE].median / row[AFTER].median for size, row in rows.items()}
        for name, rows in times.items()
    }
    path = options.out / f"demo-{client.name}.png"
    draw(path, client.label, (losses[BEFORE], losses[AFTER]), speedups, place())

    worst = max(abs(a - b) for a, b in zip(quality[BEFORE], quality[AFTER], strict=True))
    # From the timings that took turns: one training after the other also shows what else the machine was doing.
    trains, serves = (f"{min(found.values()):.2f} to {max(found.values()):.2f}" for found in speedups.values())
    return (
        f"{client.label} serves {serves} times as fast and trains {trains} times as fast. The trainings took"
        f" {seconds[BEFORE]:.0f} s\nand {seconds[AFTER]:.0f} s; their test AUCs differ by {worst:.1g} at most."
        f" The plot is {path}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo."""
    options = arguments(argv)
    start = time.perf_counter()
    print(f"Machine: {place()}")
    flights = data.load(options.rows)
    tested = len(flights.labels) - flights.train
    print(f"Data: {flights.train:,} flights from January to October 2013 to train, {tested:,} after to test")
    options.out.mkdir(parents=True, exist_ok=True)
    found = [run(client, flights, options) for client in ple.CLIENTS]
    print("\nIn short: after one line, mtlkernels.convert(model), and depending on the batch size (below 1 is slower),")
    print("\n".join(found))
    print(f"All of this took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
