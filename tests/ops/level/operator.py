"""Arguments of a level's operators, which tests call past the public function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlkernels.ops import activations as act
from mtlkernels.ops.level.call import spec_of
from mtlkernels.ops.level.spec import BATCH_NORM, LAYER_NORM, Layer, LevelSpec
from mtlkernels.testing import Case, CaseFactory

OPS = torch.ops.mtlkernels


@dataclass(frozen=True)
class Operands:
    """A level's spec and tensors."""

    spec: LevelSpec
    tensors: list[Tensor | None]
    seed: Tensor | None = None

    def forward(self, save: bool) -> tuple[Any, ...]:
        """Arguments of level_forward."""
        inputs, parameters, gates = map(list, self.spec.operands(self.tensors))
        ints, floats = map(list, self.spec.encoded)
        return inputs, parameters, gates, ints, floats, self.seed, save

    def results(self, save: bool, run: Callable[..., Any] = OPS.level_forward) -> tuple[Any, Any]:
        """Outputs and what is saved, of the operator or of an implementation."""
        return self.spec.split_results(run(*self.forward(save)))

    def backward(self, grad_outputs: Any, saved: Any, needs: Any) -> tuple[Any, ...]:
        """Arguments of level_backward."""
        *lists, ints, floats, seed, _ = self.forward(True)
        return list(grad_outputs), *lists, list(saved), ints, floats, seed, list(needs)


def of_case(case: Case) -> Operands:
    """Those of a call of the public function without norms and linear gates."""
    values, wiring = case.arguments, case.arguments["routing"].wiring
    layers, live = len(values["weights"]), wiring.live
    weights = [values["weights"][layer][e] for layer in range(layers) for e in live]
    biases = [row[e] if row else None for row in values["biases"] or [None] * layers for e in live]
    inputs = [values["inputs"]] if isinstance(values["inputs"], Tensor) else list(values["inputs"])
    names = [values["activation"]] * layers if isinstance(values["activation"], str) else values["activation"]
    spec = spec_of(wiring, len(inputs), tuple(Layer(act.CODES[name]) for name in names), False)
    return Operands(spec, [*inputs, *weights, *biases, *values["gate_logits"]])


def with_gate_layers(dtype: torch.dtype, rows: int, requires_grad: bool) -> Operands:
    """Those of a level with linear gates."""
    make = CaseFactory(0, dtype)

    def leaf(*shape: int) -> Tensor:
        return make.leaf(*shape, requires_grad=requires_grad)

    inputs = [leaf(rows, 4), leaf(rows, 4)]
    weights = [*(leaf(5, 4) for _ in range(3)), *(leaf(3, 5) for _ in range(3))]
    biases = [*(leaf(5) for _ in range(3)), None, None, None]
    gates = [leaf(2, 4), leaf(3, 4), leaf(2), None]
    spec = LevelSpec(2, (0, 1, 0), (2, 0, 0, 1, 2), (2, 3), (Layer(1), Layer(3)), (0, 1))
    return Operands(spec, [*inputs, *weights, *biases, *gates])


def with_norms(dtype: torch.dtype, rows: int, requires_grad: bool) -> Operands:
    """Those of a level with norms, dropout and slopes."""
    make = CaseFactory(0, dtype)

    def leaf(*shape: int) -> Tensor:
        return make.leaf(*shape, requires_grad=requires_grad)

    weights = [leaf(4, 3) for _ in range(3)] + [leaf(2, 4) for _ in range(3)] + [leaf(5, 2) for _ in range(3)]
    biases = [leaf(4) for _ in range(3)] + [None] * 6
    scales = [leaf(4), None, leaf(4), *(leaf(2) for _ in range(3)), None, None, None]
    shifts = [leaf(4), None, None, *(leaf(2) for _ in range(3)), None, None, None]
    logits = [leaf(rows, 2), leaf(rows, 3)]
    slopes = [None] * 3 + [leaf(1), leaf(2), leaf(1)] + [leaf(5), leaf(1), leaf(5)]
    layers = (
        Layer(1, LAYER_NORM if rows < 2 else BATCH_NORM, 1e-5),
        Layer(act.DICE, LAYER_NORM, 1e-3, 1e-3, 0.3),
        Layer(act.PRELU, dropout=0.5),
    )
    spec = LevelSpec(2, (0, 1, 0), (2, 0, 0, 1, 2), (2, 3), layers)
    inputs = [leaf(rows, 3), leaf(rows, 3)]
    return Operands(spec, [*inputs, *weights, *biases, *scales, *shifts, *slopes, *logits], torch.tensor([2**40 + 5]))
