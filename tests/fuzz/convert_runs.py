"""What a model does over three steps of training and in serving, in full."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.convert.agreement import STEPS, flat, tensors
from tests.fuzz.convert_models import Inputs
from tests.seeding import seed

# Calls of a model one after another, the last of which use what is kept of those before.
SERVED = 4
# Names of attributes that a conversion adds.
OURS = "_mtlkernels"


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay, since biases in front of batch norm have gradients of nothing but rounding."""
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1.0)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def seed_all(value: int) -> None:
    seed(value)
    random.seed(value)
    numpy.random.seed(value)


def generator_states() -> tuple[Any, ...]:
    """To be compared."""
    kind, keys, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tobytes(), *rest)


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """In evaluation without gradients; afterwards each module is in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Run:
    """Runs a model and notes all that it does, until it fails or has made its steps.

    ``found`` has tensors, or None, by part and name, as :func:`tests.convert.agreement.assert_within` compares them;
    ``failure`` where the model failed.
    """

    def __init__(self, model: Any, calls: Counter[str], inputs: Inputs, dtype: torch.dtype) -> None:
        self.model, self.calls, self.inputs, self.dtype = model, calls, inputs, dtype
        self.found: dict[str, dict[str, Any]] = {
            part: {} for part in ("outputs", "inputs", "gradients", "state", "attributes")
        }
        self.failure: str | None = None
        self.error: Exception | None = None
        self.seen: list[Any] = []

    def serve(self, words: str, rows: int) -> None:
        """Often enough for calls to be kept."""
        with serving(self.model):
            for number in range(SERVED):
                seed_all(7)
                self.found["outputs"][f"served {words} on {rows} rows, {number}"] = flat(
                    self.model(*self.inputs(rows, 9, self.dtype))
                )

    def set_rates(self, number: int) -> None:
        """Dropout drops nothing, or in the second step all here and there: fused, it draws other random numbers."""
        for i, module in enumerate(m for m in self.model.modules() if isinstance(m, nn.Dropout)):
            module.p = float(number == 1 and i % 3 == 0 and module.p > 0)

    def step(self, number: int, rows: int, optimizer: Any, losses: str, input_gradients: bool) -> None:
        seed_all(number)
        self.set_rates(number)
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            leaves.append(x.clone().requires_grad_(input_gradients))
            return leaves[-1] * 1  # what may be written to

        arguments = tree_map_only(Tensor, leaf, self.inputs(rows, number, self.dtype))
        results = tensors(self.model(*arguments))
        self.found["outputs"][f"step {number}"] = flat(results)
        self.found["inputs"][f"step {number}"] = flat([x for x in tree_leaves(arguments) if isinstance(x, Tensor)])
        wanted = {"all": results, "first": results[:1], "last": results[-1:]}[losses]
        loss = sum((y - 0.3).square().mean() for y in wanted)
        optimizer.zero_grad()
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        gradients = {f"input {i}": x.grad for i, x in enumerate(leaves)}
        gradients |= {name: p.grad for name, p in self.model.named_parameters()}
        for name, gradient in gradients.items():
            self.found["gradients"][f"{name} in step {number}"] = None if gradient is None else gradient.clone()
        optimizer.step()

    def finish(self) -> None:
        self.found["state"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.found["attributes"] = dict(_attributes(self.model))


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules keep beside parameters, buffers and sub-modules, as far as it is numbers."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if isinstance(value, Tensor):
                yield f"{path}.{name}", value.detach().clone()
            elif isinstance(value, (bool, int, float)):
                yield f"{path}.{name}", torch.tensor(float(value), dtype=torch.float64)
            else:
                yield f"{path}.{name}", torch.tensor(len(value) if hasattr(value, "__len__") else 0)


def run_steps(
    run: Run, rows: int, optimizer: str, losses: str, input_gradients: bool, later: Any, served: tuple[int, ...]
) -> None:
    """Serves, makes steps, between which ``later`` is done to the model, and serves."""
    stage = "serving"
    try:
        for count in served:
            run.serve("before", count)
        made = optimizer_of(optimizer, run.model)
        for number in range(STEPS):
            stage = f"step {number}"
            run.step(number, rows, made, losses, input_gradients)
            if number == 0:
                stage = "a later edit"
                later()
                run.serve("between", rows)
        stage = "serving"
        for count in served:
            run.serve("after", count)
    except Exception as error:  # of an edit that the model cannot stand: both have to fail
        run.failure = f"in {stage}"
        run.error = error
    run.finish()
