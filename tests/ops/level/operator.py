"""Arguments of a level's operators, which tests call past the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtlkernels.ops import activations as act
from mtlkernels.testing import Case, CaseFactory


def of_case(case: Case) -> tuple[Any, ...]:
    """Those of expert_mixture_forward for a call of the public function without norms, but for the last."""
    values, wiring = case.arguments, case.arguments["routing"].wiring
    layers, live = len(values["weights"]), wiring.live
    weights = [values["weights"][layer][e] for layer in range(layers) for e in live]
    biases = [row[e] if row else None for row in values["biases"] or [None] * layers for e in live]
    single = isinstance(values["inputs"], Tensor)
    inputs = [values["inputs"]] if single else values["inputs"]
    streams = [0] * len(live) if single else list(wiring.expert_inputs)
    names = [values["activation"]] * layers if isinstance(values["activation"], str) else values["activation"]
    gates = (list(wiring.gate_experts), list(wiring.gate_sizes))
    return inputs, weights, biases, values["gate_logits"], streams, *gates, [act.CODES[name] for name in names]


def with_gate_layers(dtype: torch.dtype, rows: int, requires_grad: bool) -> tuple[Any, ...]:
    """Those of expert_level_forward, but for the last."""
    make = CaseFactory(0, dtype)

    def leaf(*shape: int) -> Tensor:
        return make.leaf(*shape, requires_grad=requires_grad)

    inputs = [leaf(rows, 4), leaf(rows, 4)]
    weights = [*(leaf(5, 4) for _ in range(3)), *(leaf(3, 5) for _ in range(3))]
    biases = [*(leaf(5) for _ in range(3)), None, None, None]
    gates = ([leaf(2, 4), leaf(3, 4)], [leaf(2), None])
    return inputs, weights, biases, *gates, [0, 1, 0], [2, 0, 0, 1, 2], [2, 3], [1, 3]


def with_norms(dtype: torch.dtype, rows: int, requires_grad: bool) -> tuple[Any, ...]:
    """Those of normalized_mixture_forward."""
    make = CaseFactory(0, dtype)

    def leaf(*shape: int) -> Tensor:
        return make.leaf(*shape, requires_grad=requires_grad)

    weights = [leaf(4, 3) for _ in range(3)] + [leaf(2, 4) for _ in range(3)] + [leaf(5, 2) for _ in range(3)]
    biases = [leaf(4) for _ in range(3)] + [None] * 6
    scales = [leaf(4), None, leaf(4), *(leaf(2) for _ in range(3)), None, None, None]
    shifts = [leaf(4), None, None, *(leaf(2) for _ in range(3)), None, None, None]
    logits = [leaf(rows, 2), leaf(rows, 3)]
    slopes = [None] * 3 + [leaf(1), leaf(2), leaf(1)] + [leaf(5), leaf(1), leaf(5)]
    routing = ([0, 1, 0], [2, 0, 0, 1, 2], [2, 3], [1, act.DICE, act.PRELU])
    norms = [2 if rows < 2 else 1, 2, 0]
    inputs = [leaf(rows, 3), leaf(rows, 3)]
    seed = torch.tensor([2**40 + 5])
    numbers = ([1e-5, 1e-3, 0.0], [0.0, 1e-3, 0.0], [0.0, 0.3, 0.5])
    return inputs, weights, biases, scales, shifts, slopes, logits, *routing, norms, *numbers, seed
