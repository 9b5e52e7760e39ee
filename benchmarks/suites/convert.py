"""``mk.convert``: whole models of deepctr-torch and torch-rechub, as they are and converted.

Workloads (``B`` rows), all with 416 features (10 embeddings of 40, 16 numbers), experts of (256, 128), 2 tasks, and 4
experts a task and 4 shared ones (MMOE: 12 experts):

- **rechub-PLE** two levels; batch norm in every expert and gate. **rechub-MMOE** one level of it.
  **rechub-PLE-PReLU** and **rechub-PLE-Dice** are PLE with these activations in the experts.
- **deepctr-PLE** two levels, gates with a hidden layer of 64; **deepctr-PLE-BN** with batch norm in experts and gates.

A training step is the forward pass, the loss (cross-entropy, and deepctr-torch's own regularisation), the backward pass
and Adam with its learning rate at 0, so that each step does the same work on the same weights. Serving is the forward
pass in ``eval()`` under ``torch.inference_mode()``. In bfloat16 the forward pass is under ``torch.autocast``, and
parameters and optimizer stay in float32.

Where the time goes: "embedding", "trunk" and "towers" are forward and backward passes of these parts, the last with the
loss; "optimizer" is Adam's step. Together they are about a training step.

Before it is timed, each contender's predictions, gradients by part and running statistics are held against float64.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.harness.case import BASELINE, OURS, Bench, Case, Contender, Curve, Step, Suite
from benchmarks.peers.library_models import MODELS, PARTS, LibraryModel, features, has_corners, loss_of

TRAINING, SERVING = "training step", "serving"
OPTIMIZER = "optimizer"
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
FEWER_ROWS = {"rechub-MMOE": (1, 16, 256, 4096), "deepctr-PLE-BN": (1, 16, 256, 4096)}
FEWER_ROWS |= {"rechub-PLE-PReLU": (1, 64, 4096), "rechub-PLE-Dice": (1, 64, 4096)}
PART_ROWS = 4096
AUTOCAST_ROWS = {"rechub-PLE": (1, 16, 64, 256, 4096), "deepctr-PLE": (1, 16, 256, 4096)}
# Where torch.compile's contenders stand too; compiling takes longer than all else.
COMPILED = {("rechub-PLE", TRAINING, rows, torch.float32) for rows in (16, 4096)}
COMPILED |= {("rechub-PLE", SERVING, rows, torch.float32) for rows in (1, 64, 4096)}
COMPILED |= {("rechub-PLE", TRAINING, 4096, torch.bfloat16)}
COMPILED |= {("rechub-PLE", SERVING, rows, torch.bfloat16) for rows in (1, 4096)}
# Batch norm divides by what rounding has made of a variance, and its gradients are differences: PyTorch's own of towers
# are off by 4.6e-5 of their size at 8192 rows.
SLACK = 16.0
# In training so many rows are repeated, which are drawn until no ReLU's input is zero but for rounding: there the
# derivative jumps, and batch norm carries that to all rows. Repeating rows leaves the statistics of a batch as they
# are, and the time of all but the embedding, whose tables fit a cache either way.
DISTINCT_ROWS, MOST_DRAWS = 16, 60


class Workload:
    """A model's inputs, and its weights in float64."""

    def __init__(self, model: LibraryModel, rows: int, training: bool) -> None:
        self.model, self.training = model, training
        self.source = model.build().train(training)
        self.x = self._clear_of_corners(rows) if training else _draw(rows, 0)
        self.labels = torch.randint(0, 2, (rows, 2)).float()

    def _clear_of_corners(self, rows: int) -> Tensor:
        exact = self.exact()
        for seed in range(MOST_DRAWS):
            x = _draw(min(rows, DISTINCT_ROWS), seed)
            if not has_corners(exact, self.model.arguments(x.double())):
                return x[torch.arange(rows) % len(x)]
        raise ValueError(f"{MOST_DRAWS} draws of {len(x)} rows all have an input of a ReLU that is nearly zero")

    def exact(self) -> Any:
        """A copy in float64."""
        return copy.deepcopy(self.source).double()

    def arguments(self, module: Any) -> Any:
        """The features as the module takes them, in its dtype."""
        return self.model.arguments(self.x.to(next(module.parameters()).dtype))


def _draw(rows: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return features(rows)


class WholeStep:
    """A training step or a serving call of one module."""

    def __init__(
        self, work: Workload, module: Any, forward: Callable[[Any], Tensor] | None = None, cast: bool = False
    ) -> None:
        dtype = next(module.parameters()).dtype
        self.work, self.module, self.cast = work, module, cast
        self.forward = module if forward is None else forward
        self.arguments = work.arguments(module)
        self.labels = work.labels.to(dtype)
        self.optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
        self.outputs: Sequence[Tensor] = ()

    def __call__(self) -> None:
        self.outputs = ()
        if not self.work.training:
            with torch.inference_mode():
                self.outputs = (self._predict(),)
            return
        self.optimizer.zero_grad()
        predictions = self._predict()
        loss_of(self.module, predictions, self.labels).backward()
        self.optimizer.step()
        self.outputs = (predictions.detach(),)

    def _predict(self) -> Tensor:
        """In the parameters' dtype, as a loss wants it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
            predictions = self.forward(self.arguments)
        return predictions.to(self.labels.dtype)

    def results(self) -> Mapping[str, Tensor]:
        found = {"outputs: predictions": self.outputs[0]}
        if self.work.training:
            found |= gradients(self.work.model, self.module)
            found |= statistics(self.module)
        return found


class PartStep:
    """Forward and backward pass of one part of a model, or the optimizer's step."""

    def __init__(self, work: Workload, module: Any, part: str) -> None:
        assert work.model.parts is not None
        dtype = next(module.parameters()).dtype
        self.work, self.module, self.part = work, module, part
        self.labels = work.labels.to(dtype)
        functions = work.model.parts(module)
        self.function = functions.get(part)
        given: Any = work.arguments(module)
        with torch.no_grad():
            for name in PARTS[: PARTS.index(part)] if part in PARTS else ():
                given = functions[name](given)
        self.given, self.leaves = _leaves(given) if part in ("trunk", "towers") else (given, [])
        self.optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
        self.outputs: Sequence[Tensor] = ()
        if self.function is None:
            WholeStep(work, module)()  # for gradients
            return
        with torch.no_grad():
            made = self.function(self.given)
        generator = torch.Generator().manual_seed(2)
        tensors = [made] if isinstance(made, Tensor) else made
        self.cotangents = [torch.randn(y.shape, generator=generator).to(dtype) for y in tensors]

    def __call__(self) -> None:
        self.outputs = ()
        if self.function is None:
            self.optimizer.step()
            return
        self.module.zero_grad()
        for leaf in self.leaves:
            leaf.grad = None
        made = self.function(self.given)
        if self.part == "towers":
            loss_of(self.module, made, self.labels).backward()
        else:
            torch.autograd.backward(made, self.cotangents if not isinstance(made, Tensor) else self.cotangents[0])
        self.outputs = tuple(y.detach() for y in ([made] if isinstance(made, Tensor) else made))

    def results(self) -> Mapping[str, Tensor]:
        if self.function is None:
            kept = [state["exp_avg"].flatten() for state in self.optimizer.state.values()]
            return {"optimizer: first moments": torch.cat(kept)}
        found = {f"outputs: {i}": y for i, y in enumerate(self.outputs)}
        found |= {f"gradients: input {i}": _grad(leaf) for i, leaf in enumerate(self.leaves)}
        return found | gradients(self.work.model, self.module)


def _leaves(given: Any) -> tuple[Any, list[Tensor]]:
    """What a part is given, as tensors that want gradients."""
    if isinstance(given, Tensor):
        leaf = given.detach().requires_grad_()
        return leaf, [leaf]
    leaves = [x.detach().requires_grad_() for x in given]
    return leaves, leaves


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} got no gradient")
    return tensor.grad


def gradients(model: LibraryModel, module: Any) -> dict[str, Tensor]:
    """The gradients of each part in one tensor; one alone may be a sum of nearly nothing, as a bias's before a norm."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found.setdefault(f"gradients: {model.part_of(name)}", []).append(parameter.grad.flatten())
    return {part: torch.cat(tensors) for part, tensors in found.items()}


def statistics(module: Any) -> dict[str, Tensor]:
    """Running means and variances; deepctr-torch's last shared gate, which nobody reads, is left out."""
    found = [
        value.flatten()
        for name, value in module.named_buffers()
        if name.endswith(("running_mean", "running_var")) and not name.startswith("shared_gate_dnn.1.")
    ]
    return {"statistics: running": torch.cat(found)} if found else {}


def converted(module: Any) -> Any:
    """A converted copy, also where only the reference is there to be timed."""
    other = copy.deepcopy(module)
    report = mk.convert(other, force=True)
    if report.left_alone or not report.replaced:
        raise ValueError(f"not all was replaced: {report}")
    return other


def build(name: str, work: str, rows: int, dtype: torch.dtype, device: torch.device) -> Bench:
    """Parameters and inputs from a fixed seed, and everybody who evaluates them."""
    gc.collect()
    model = MODELS[name]
    load = Workload(model, rows, work != SERVING)
    backend = mk.backends()["expert_mixture"][device.type][0]

    def step(module: Any, compile_it: bool = False, cast: bool = dtype is torch.bfloat16) -> Step:
        if work not in (TRAINING, SERVING):
            return PartStep(load, module, work)
        return WholeStep(load, module, torch.compile(module, dynamic=False) if compile_it else None, cast)

    def expected() -> Mapping[str, Tensor]:
        exact = step(load.exact(), cast=False)
        exact()
        exact()
        return exact.results()

    contenders = [
        Contender(BASELINE, f"{model.label} as it is", lambda: step(copy.deepcopy(load.source))),
        Contender(OURS, f"converted ({backend})", lambda: step(converted(load.source))),
    ]
    if (name, work, rows, dtype) in COMPILED:
        contenders[1:1] = [
            Contender("compile", "as it is, torch.compile", lambda: step(copy.deepcopy(load.source), True)),
            Contender("ours-compile", "converted, torch.compile", lambda: step(converted(load.source), True)),
        ]
    return Bench(contenders, expected, slack=1.0 if work == SERVING else SLACK)


@functools.cache
def parameters(name: str) -> int:
    """Their number."""
    return sum(p.numel() for p in MODELS[name].build().parameters())


def case(name: str, work: str, rows: int, dtype: torch.dtype = torch.float32) -> Case:
    """A row of the table."""
    model = MODELS[name]
    training = work != SERVING
    # Adam reads weight, gradient and two moments and writes three of them; the passes read weights, write gradients.
    traffic = 4.0 * parameters(name) * (10 if training else 1)
    return Case(
        workload=name,
        work=work,
        dtype=dtype,
        size={"B": rows},
        flop=model.flop(rows, training) if work in (TRAINING, SERVING, "trunk") else 0.0,
        traffic=traffic,
        build=lambda device: build(name, work, rows, dtype, device),
        resident=not training,
        quick=name == "rechub-PLE" and rows == 16,
        rounds=3,
        seconds=1.5,
    )


def cases(device_type: str) -> Iterator[Case]:
    """Every row; on a CPU, where the libraries' models are."""
    if device_type != "cpu":
        return
    for name, model in MODELS.items():
        for work in (TRAINING, SERVING):
            for rows in FEWER_ROWS.get(name, ROWS):
                if rows > 1 or work == SERVING or not model.batch_norm:
                    yield case(name, work, rows)
    for name, of_autocast in AUTOCAST_ROWS.items():
        for work in (TRAINING, SERVING):
            for rows in of_autocast:
                if rows > 1 or work == SERVING or not MODELS[name].batch_norm:
                    yield case(name, work, rows, torch.bfloat16)
    for name, model in MODELS.items():
        if model.parts is not None:
            for part in (*PARTS, OPTIMIZER):
                yield case(name, part, PART_ROWS)


SUITE = Suite(
    name="convert",
    title="Existing models, as they are and converted",
    cases=cases,
    curves=(
        Curve("training", "torch-rechub's PLE, a training step", "B", ("rechub-PLE",), TRAINING),
        Curve("serving", "torch-rechub's PLE, serving", "B", ("rechub-PLE",), SERVING),
    ),
)
