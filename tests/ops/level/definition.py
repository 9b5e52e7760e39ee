"""A level of experts and gates by its formula, term by term, independent of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import mtlkernels as mk
from tests.ops.agreement import KINKED
from tests.ops.gated_mixture.definition import mix
from tests.seeding import seed

KINDS = ("none", "batch", "layer")
SEED = 11  # of torch's generator, before each call that drops

Words = npt.NDArray[np.uint64]

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: x.clamp(min=0) + 0.01 * x.clamp(max=0),
    "gelu": lambda x: x * 0.5 * (1 + (x / math.sqrt(2)).erf()),
    "silu": lambda x: x * (1 / (1 + (-x).exp())),
    "tanh": lambda x: 2 / (1 + (-2 * x).exp()) - 1,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def with_noise_at_kink(name: str, noise: float) -> Callable[[Tensor], Tensor]:
    """The activation; its derivative's sign is taken from an input with noise of so many root mean squares."""

    def activate(x: Tensor) -> Tensor:
        noisy = x.detach() + noise * x.detach().square().mean().sqrt() * torch.randn_like(x)
        slope = torch.where(noisy > 0, torch.ones_like(x), KINKED[name]).detach()
        return ACTIVATIONS[name](x).detach() + slope * (x - x.detach())

    return activate


def philox(counter: Sequence[Words], key: int) -> list[Words]:
    """Philox4x32-10 in 64-bit integers: the four words of each counter of four."""
    mask = np.uint64(0xFFFFFFFF)
    c = list(counter)
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k = [np.uint64(keys[0]), np.uint64(keys[1])]
        half = np.uint64(32)
        c = [(second >> half) ^ c[1] ^ k[0], second & mask, (first >> half) ^ c[3] ^ k[1], first & mask]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return c


def kept(key: int, layer: int, expert: int, rows: int, width: int, rate: float) -> Tensor:
    """What dropout keeps of the output [rows, width] of a layer of an expert."""
    row, column = np.indices((rows, width), dtype=np.uint64)
    constants = [np.full_like(row, expert), np.full_like(row, layer)]
    words = np.stack(philox([column // np.uint64(4), row, *constants], key))
    word = np.take_along_axis(words, (column % np.uint64(4)).astype(np.int64)[None], 0)[0]
    return torch.from_numpy(word >= np.uint64(round(rate * 2**32)))


def drawn_seed(device: torch.device) -> int:
    """The seed that a call with dropout draws; leaves the generator, of which noise at kinks comes, alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed(SEED)
        return int(torch.randint(0, 2**63 - 1, (1,), device=device))


def dropped(x: Tensor, key: int, layer: int, expert: int, rate: float) -> Tensor:
    """``x``, the output of a layer of an expert, times what dropout makes of a key."""
    if rate == 0:
        return x
    mask = kept(key, layer, expert, *x.shape, rate=rate).to(x.device)
    return x * mask * (1 / (1 - rate) if rate < 1 else 0.0)


def prelu(x: Tensor, slope: Tensor, noise: float) -> Tensor:
    """max(x, 0) + a min(x, 0); the sign is taken from an input with noise of so many root mean squares."""
    noisy = x.detach() + (noise * x.detach().square().mean().sqrt() * torch.randn_like(x) if noise else 0.0)
    return torch.where(noisy > 0, x, x * slope)


def dice(x: Tensor, slope: Tensor, eps: float) -> Tensor:
    """torch-rechub's: the gate's statistics are over the features of a row, and the sum of squares is no mean."""
    distance = x - x.mean(dim=1, keepdim=True)
    gate = 1 / (1 + (-distance / (distance.square() + eps).sum(dim=1, keepdim=True).sqrt()).exp())
    return gate * x + (1 - gate) * slope * x


def _activated(name: str, x: Tensor, slope: Any, eps: float, noise: float) -> Tensor:
    if name == "prelu":
        return prelu(x, slope, noise)
    if name == "dice":
        return dice(x, slope, eps)
    activation: Any = with_noise_at_kink(name, noise) if noise and name in KINKED else ACTIVATIONS[name]
    return activation(x)


def _standardized(x: Tensor, dim: int, eps: float) -> Tensor:
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim, keepdim=True) + eps).sqrt()


def entry(part: Any, layer: int, expert: int) -> Any:
    """What an expert has of a part of a level that some layers, or all, may lack."""
    return None if part is None or part[layer] is None else part[layer][expert]


def linear_gates(inputs: Any, gate_weights: Any, gate_biases: Any, routing: mk.Routing) -> list[Tensor]:
    """The logits of gates that are linear layers of one stream or one each."""
    sizes = [len(gate) for gate in routing.gate_experts]
    streams = [inputs] * len(sizes) if isinstance(inputs, Tensor) else inputs
    weights = gate_weights.split(sizes) if isinstance(gate_weights, Tensor) else gate_weights
    biases = gate_biases.split(sizes) if isinstance(gate_biases, Tensor) else gate_biases or [None] * len(sizes)
    return [
        x @ weight.transpose(0, 1) + (0 if bias is None else bias)
        for x, weight, bias in zip(streams, weights, biases, strict=True)
    ]


def formula(
    *,
    inputs: Any,
    weights: Any,
    biases: Any,
    routing: mk.Routing,
    gate_logits: Any = None,
    gate_weights: Any = None,
    gate_biases: Any = None,
    activation: str | Sequence[str] = "relu",
    kinds: Sequence[str] | None = None,
    eps: Sequence[float] | None = None,
    scales: Any = None,
    shifts: Any = None,
    means: Any = None,
    variances: Any = None,
    slopes: Any = None,
    dice_eps: Sequence[float] | None = None,
    dropout: Sequence[float] | None = None,
    kink_noise: float = 0.0,
) -> list[Tensor]:
    """Every expert by itself, x <- dropout(activation(norm(x W^T + b))) a layer, then the mixture.

    A batch norm in a layer that has ``means`` and ``variances`` uses these.
    """
    names = [activation] * len(weights) if isinstance(activation, str) else activation
    live = sorted({e for gate in routing.gate_experts for e in gate})
    key = drawn_seed(weights[0][0].device) if dropout and any(dropout) else 0
    outputs = []
    for e, stream in enumerate(routing.expert_inputs):
        x = inputs if isinstance(inputs, Tensor) else inputs[stream]
        for layer, name in enumerate(names):
            x = x @ weights[layer][e].transpose(0, 1)
            if (bias := entry(biases, layer, e)) is not None:
                x = x + bias
            if eps and (mean := entry(means, layer, e)) is not None:
                x = (x - mean) / (entry(variances, layer, e) + eps[layer]).sqrt()
            elif kinds and eps and kinds[layer] != "none":
                x = _standardized(x, KINDS.index(kinds[layer]) - 1, eps[layer])
            if (scale := entry(scales, layer, e)) is not None:
                x = x * scale + entry(shifts, layer, e)
            x = _activated(name, x, entry(slopes, layer, e), dice_eps[layer] if dice_eps else 0.0, kink_noise)
            if dropout and e in live:
                x = dropped(x, key, layer, live.index(e), dropout[layer])
        outputs.append(x)
    logits = gate_logits if gate_weights is None else linear_gates(inputs, gate_weights, gate_biases, routing)
    return mix(outputs, logits, routing)
