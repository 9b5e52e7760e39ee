"""A process that serves: ``python -m benchmarks.serving.worker MODEL CONTENDER DTYPE THREADS CLIENTS FOLDER``.

It reads a command a line from standard input, as JSON, and answers each with a line. ``{"rows": B}`` gets it ready for
so many rows, and says which file in FOLDER has the outputs for :func:`rows_of`; ``{"seconds": s}`` calls it one time
after another and answers with the times in microseconds, or with several clients from a thread each, and answers with
the calls a second. The threads stay from one round to the next, and each has called before the first.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.contenders import CONTENDERS, RUNTIMES, Load, Serve
from benchmarks.serving.models import MODELS, Model

# Inputs that calls take in turn, so that none is found in a first-level cache.
INPUTS = 8
WARM_UP_SECONDS = 0.1
# What each of several clients does at least in a round, however slow: of one call the end of a round would be too much.
CALLS = 4


def rows_of(model: Model, rows: int) -> list[Tensor]:
    """The same inputs in every process, in float32."""
    torch.manual_seed(rows)
    return [model.rows(rows) for _ in range(INPUTS)]


class Worker:
    """One contender, in one dtype, under one load."""

    def __init__(self, model: str, contender: str, dtype: str, load: Load, folder: Path) -> None:
        torch.set_num_threads(load.threads)
        self.model, self.contender = MODELS[model], CONTENDERS[contender]
        self.dtype, self.load = getattr(torch, dtype), load
        self.in_float32 = contender in RUNTIMES
        self.folder = folder
        self.serve: Serve | None = None
        self.inputs: list[Tensor] = []
        self.pool = ThreadPoolExecutor(load.clients, initializer=torch.set_num_threads, initargs=(load.threads,))
        self.together = threading.Barrier(load.clients)

    def ready(self, rows: int) -> dict[str, Any]:
        inputs = rows_of(self.model, rows)
        if self.serve is None or self.contender.anew:
            example = self.model.rows(rows).to(self.dtype if self.model.casts else torch.float32)
            source = self.model.modules().to(self.dtype)
            self.serve = self.contender.make(self.model, source, example, self.load)
        if self.model.casts and not self.in_float32:
            inputs = [x.to(self.dtype) for x in inputs]
        self.inputs = inputs
        outputs = self.serve(inputs[0])
        several = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        found = [torch.as_tensor(y).float().clone() for y in several]
        path = self.folder / "outputs.pt"
        torch.save(found, path)
        if self.load.clients == 1:
            self.times(WARM_UP_SECONDS)
        else:
            self.calls_a_second(WARM_UP_SECONDS, 1)
        return {"outputs": str(path)}

    def times(self, seconds: float) -> dict[str, Any]:
        assert self.serve is not None
        found = []
        end = time.perf_counter() + seconds
        for x in cycle(self.inputs):
            start = time.perf_counter()
            self.serve(x)
            now = time.perf_counter()
            found.append(1e6 * (now - start))
            if now > end:
                return {"microseconds": found}
        raise AssertionError("there are inputs")

    def calls_a_second(self, seconds: float, least: int = CALLS) -> dict[str, Any]:
        """Of all clients, each by its own clock; a round is as long as the ``least`` calls of each take, or longer."""

        def client(first: int) -> float:
            assert self.serve is not None
            self.together.wait()  # so that each thread is one client
            start = now = time.perf_counter()
            count = 0
            while count < least or now - start < seconds:
                self.serve(self.inputs[(first + count) % INPUTS])
                count += 1
                now = time.perf_counter()
            return count / (now - start)

        return {"calls_a_second": sum(self.pool.map(client, range(self.load.clients)))}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if "rows" in command:
            return self.ready(command["rows"])
        return self.times(command["seconds"]) if self.load.clients == 1 else self.calls_a_second(command["seconds"])


def main(model: str, contender: str, dtype: str, threads: str, clients: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what runtimes print is no answer
    worker = Worker(model, contender, dtype, Load(int(threads), int(clients)), Path(folder))
    for line in sys.stdin:
        try:
            found = worker.answer(json.loads(line))
        except Exception as error:  # whatever a runtime cannot do is its result
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
