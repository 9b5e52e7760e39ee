"""Experts with norms and dropout by their formulas, independent of the package, and random calls of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import activations as act
from mtlkernels.testing import LAYOUTS, Case, CaseFactory, random_routing
from tests.ops.definition import ACTIVATIONS as FORMULAS
from tests.ops.definition import KINKED, mix, with_noise_at_kink

KINDS = ("none", "batch", "layer")
ROWS = (2, 3, 5, 16, 31, 64, 65, 100, 127, 128, 129, 255, 256, 257)
SEED = 11  # of torch's generator, before each call

Words = npt.NDArray[np.uint64]


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
        torch.manual_seed(SEED)
        return int(torch.randint(0, 2**63 - 1, (1,), device=device))


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
    activation: Any = with_noise_at_kink(name, noise) if noise and name in KINKED else FORMULAS[name]
    return activation(x)


def _standardized(x: Tensor, dim: int, eps: float) -> Tensor:
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim, keepdim=True) + eps).sqrt()


def definition(
    inputs: Any,
    weights: Any,
    biases: Any,
    gate_logits: Any,
    routing: mk.Routing,
    *,
    activation: Sequence[str],
    kinds: Sequence[str],
    eps: Sequence[float],
    scales: Any,
    shifts: Any,
    slopes: Any,
    dice_eps: Sequence[float],
    dropout: Sequence[float],
    kink_noise: float = 0.0,
) -> list[Tensor]:
    """Every expert by itself, x <- dropout(activation(norm(x W^T + b))) a layer, then the mixture."""
    key = drawn_seed(weights[0][0].device)
    live = sorted({e for gate in routing.gate_experts for e in gate})
    outputs = []
    for e, stream in enumerate(routing.expert_inputs):
        x = inputs if isinstance(inputs, Tensor) else inputs[stream]
        for layer, (name, kind, rate) in enumerate(zip(activation, kinds, dropout, strict=True)):
            x = x @ weights[layer][e].transpose(0, 1)
            if biases is not None and biases[layer] is not None:
                x = x + biases[layer][e]
            if kind != "none":
                x = _standardized(x, KINDS.index(kind) - 1, eps[layer])
            if scales[layer] is not None:
                x = x * scales[layer][e] + shifts[layer][e]
            x = _activated(name, x, slopes[layer] and slopes[layer][e], dice_eps[layer], kink_noise)
            if rate > 0 and e in live:
                mask = kept(key, layer, live.index(e), *x.shape, rate=rate).to(x.device)
                x = x * mask * (1 / (1 - rate) if rate < 1 else 0.0)
        outputs.append(x)
    return [y.to(outputs[0].dtype) for y in mix(outputs, gate_logits, routing)]


def by_pytorch(
    inputs: Any,
    weights: Any,
    biases: Any,
    gate_logits: Any,
    routing: mk.Routing,
    *,
    activation: Sequence[str],
    kinds: Sequence[str],
    eps: Sequence[float],
    scales: Any,
    shifts: Any,
    slopes: Any,
    dice_eps: Sequence[float],
    dropout: Sequence[float],
) -> list[Tensor]:
    """What a user would write: PyTorch's own layers one after another, with the same masks."""
    key = drawn_seed(weights[0][0].device)
    live = sorted({e for gate in routing.gate_experts for e in gate})
    outputs = []
    for e in live:
        x = inputs if isinstance(inputs, Tensor) else inputs[routing.expert_inputs[e]]
        for layer, (name, kind, rate) in enumerate(zip(activation, kinds, dropout, strict=True)):
            x = F.linear(x, weights[layer][e], biases[layer][e] if biases and biases[layer] is not None else None)
            affine = [None if part[layer] is None else part[layer][e].to(x.dtype) for part in (scales, shifts)]
            if kind == "batch":
                x = F.batch_norm(x, None, None, *affine, training=True, eps=eps[layer])
            elif kind == "layer":
                x = F.layer_norm(x, x.shape[1:], *affine, eps=eps[layer])
            if name == "prelu":
                x = F.prelu(x, slopes[layer][e].to(x.dtype))
            elif name == "dice":
                x = dice(x, slopes[layer][e].to(x.dtype), dice_eps[layer])
            else:
                x = act.activate(act.CODES[name], x)
            if rate > 0:
                mask = kept(key, layer, live.index(e), *x.shape, rate=rate).to(x.device)
                x = x * mask * (1 / (1 - rate) if rate < 1 else 0.0)
        outputs.append(x)
    gates = tuple(tuple(live.index(e) for e in gate) for gate in routing.gate_experts)
    with mk.use_backend("reference"):
        mixed = mk.gated_mixture(torch.stack(outputs, 1), gate_logits, mk.Routing((0,) * len(live), gates))
    return list(mixed)


def module(kind: str, width: int, eps: float, scale: Tensor | None, shift: Tensor | None) -> nn.Module:
    """A norm in training that reads these tensors, which need not be parameters."""
    if kind == "batch":
        made: Any = nn.BatchNorm1d(width, eps=eps, affine=False, track_running_stats=False)
    else:
        made = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    for name, tensor in (("weight", scale), ("bias", shift)):
        del made._parameters[name]
        setattr(made, name, tensor)
    return made


def fused(*, kinds: Sequence[str], eps: Sequence[float], scales: Any, shifts: Any, **arguments: Any) -> Any:
    """The call with modules made of the scales and shifts."""
    norms: list[Any] = []
    experts = arguments["routing"].num_experts
    for layer, kind in enumerate(kinds):
        width = arguments["weights"][layer][0].shape[0]
        parts = [part[layer] or [None] * experts for part in (scales, shifts)]
        made = [module(kind, width, eps[layer], *pair) for pair in zip(*parts, strict=True)] if kind != "none" else None
        norms.append(made)
    torch.manual_seed(SEED)
    return mk.expert_mixture(**arguments, norms=norms)


def by_reference(**arguments: Any) -> Any:
    with mk.use_backend("reference"):
        return fused(**arguments)


def case(
    make: CaseFactory,
    rows: int,
    widths: Sequence[int],
    routing: mk.Routing,
    kinds: Sequence[str],
    *,
    activation: str | Sequence[str] = "relu",
    dropout: Sequence[float] | None = None,
    affine: Sequence[bool] | None = None,
    eps: Sequence[float] | None = None,
    one_slope: Sequence[bool] | None = None,
    **options: Any,
) -> Case:
    """A call of :func:`fused`; where no layer is ``affine``, norms have neither scale nor shift.

    ``one_slope``: whether the slopes of a layer's activation, if it has any, are one an expert or one a channel.
    """
    names = [activation] * len(kinds) if isinstance(activation, str) else list(activation)
    plain = make.expert_mixture(rows, widths, routing, activation=names, **options)
    scales: list[Any] = []
    shifts: list[Any] = []
    for width, kind, has in zip(widths[1:], kinds, affine or [True] * len(kinds), strict=True):
        there = kind != "none" and has
        scales.append([make.leaf(width) for _ in range(routing.num_experts)] if there else None)
        shifts.append([make.leaf(width) for _ in range(routing.num_experts)] if there else None)
    slopes: list[Any] = []
    for width, name, one in zip(widths[1:], names, one_slope or [False] * len(kinds), strict=True):
        there = name in act.WITH_SLOPES
        slopes.append([make.leaf(1 if one else width) for _ in range(routing.num_experts)] if there else None)
    own = {
        "kinds": list(kinds),
        "eps": list(eps or [1e-5] * len(kinds)),
        "scales": scales,
        "shifts": shifts,
        "slopes": slopes,
        "dice_eps": [1e-3] * len(kinds),
        "dropout": list(dropout or [0.0] * len(kinds)),
    }
    return Case({**plain.arguments, **own}, make.dtype)


def random_case(seed: int, dtype: torch.dtype, *, device: str = "cpu", max_width: int = 70) -> Case:
    """A free routing, one to three layers of odd widths; some norm or dropout in at least one of them.

    Never so that a variance is zero but for rounding: then nothing that is divided by its root would be determined.
    """
    layouts = [layout for layout in LAYOUTS if layout != "expanded"]
    make = CaseFactory(seed, dtype, device=device, layouts=layouts)
    rng: random.Random = make.rng
    routing = random_routing(rng)
    layers = rng.randint(1, 3)
    kinds = [rng.choice(KINDS) for _ in range(layers)]
    dropout = [rng.choice((0.0, 0.0, 0.1, 0.5)) for _ in range(layers)]
    if set(kinds) == {"none"} and not any(dropout):
        kinds[-1] = "batch"
    return case(
        make,
        rng.choice(ROWS),
        [rng.randint(1, max_width), *(rng.randint(2, max_width) for _ in range(layers))],
        routing,
        kinds,
        activation=[rng.choice(list(act.CODES)) for _ in range(layers)],
        dropout=dropout,
        affine=[rng.random() < 0.7 for _ in range(layers)],
        eps=[rng.choice((1e-2, 1.0)) for _ in range(layers)],
        one_slope=[rng.random() < 0.5 for _ in range(layers)],
        biases=[rng.random() < 0.7 for _ in range(layers)],
        streams=rng.random() < 0.7,
        stacked=rng.random() < 0.3,
        joined_logits=rng.random() < 0.3,
    )
