"""Calls of levels with norms, dropout and slopes: random ones, by modules, and by PyTorch's own layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import activations as act
from mtlkernels.testing import LAYOUTS, Case, CaseFactory, random_routing
from tests.ops import agreement
from tests.ops.agreement import reference_op
from tests.ops.level.definition import KINDS, SEED, dice, drawn_seed, dropped, entry, formula
from tests.seeding import seed

ROWS = (2, 3, 5, 16, 31, 64, 65, 100, 127, 128, 129, 255, 256, 257, 383, 384, 401)
# A norm divides by a spread that rounding moves, so that errors scatter more than those of sums.
FACTOR = 5.0


def experts_by_pytorch(
    inputs: Any,
    weights: Any,
    biases: Any,
    routing: mk.Routing,
    *,
    activation: Sequence[str],
    kinds: Sequence[str],
    eps: Sequence[float],
    scales: Any,
    shifts: Any,
    means: Any = None,
    variances: Any = None,
    slopes: Any,
    dice_eps: Sequence[float],
    dropout: Sequence[float],
) -> dict[int, Tensor]:
    """The outputs of experts that some gate mixes, by PyTorch's own layers one after another, with the same masks."""
    key = drawn_seed(weights[0][0].device)
    outputs = {}
    for number, e in enumerate(sorted({e for gate in routing.gate_experts for e in gate})):
        x = inputs if isinstance(inputs, Tensor) else inputs[routing.expert_inputs[e]]
        for layer, (name, kind, rate) in enumerate(zip(activation, kinds, dropout, strict=True)):
            x = F.linear(x, weights[layer][e], entry(biases, layer, e))
            affine = [None if part[layer] is None else part[layer][e].to(x.dtype) for part in (scales, shifts)]
            if (mean := entry(means, layer, e)) is not None:
                x = F.batch_norm(x, mean, entry(variances, layer, e), *affine, eps=eps[layer])
            elif kind == "batch":
                x = F.batch_norm(x, None, None, *affine, training=True, eps=eps[layer])
            elif kind == "layer":
                x = F.layer_norm(x, x.shape[1:], *affine, eps=eps[layer])
            if name == "prelu":
                x = F.prelu(x, slopes[layer][e].to(x.dtype))
            elif name == "dice":
                x = dice(x, slopes[layer][e].to(x.dtype), dice_eps[layer])
            else:
                x = act.activate(act.CODES[name], x)
            x = dropped(x, key, layer, number, rate)
        outputs[e] = x
    return outputs


def by_pytorch(*, gate_logits: Any, routing: mk.Routing, **arguments: Any) -> list[Tensor]:
    """What a user would write, mixed by the reference of ``gated_mixture``."""
    outputs = experts_by_pytorch(routing=routing, **arguments)
    live = list(outputs)
    gates = tuple(tuple(live.index(e) for e in gate) for gate in routing.gate_experts)
    routing = mk.Routing((0,) * len(live), gates)
    stacked = torch.stack(list(outputs.values()), 1)
    return list(reference_op(mk.gated_mixture, experts=stacked, gate_logits=gate_logits, routing=routing))


def module(
    kind: str,
    width: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> nn.Module:
    """A norm in training, or with these statistics, that reads these tensors, which need not be parameters."""
    if kind == "batch":
        made: Any = nn.BatchNorm1d(width, eps=eps, affine=False, track_running_stats=mean is not None)
        if mean is not None:
            made.running_mean, made.running_var = mean, variance
            made.eval()
    else:
        made = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    for name, tensor in (("weight", scale), ("bias", shift)):
        del made._parameters[name]
        setattr(made, name, tensor)
    return made


def with_modules(
    *,
    kinds: Sequence[str],
    eps: Sequence[float],
    scales: Any,
    shifts: Any,
    means: Any = None,
    variances: Any = None,
    **arguments: Any,
) -> dict[str, Any]:
    """The arguments of the op, with modules made of the scales, shifts and statistics."""
    norms: list[Any] = []
    experts = arguments["routing"].num_experts
    for layer, kind in enumerate(kinds):
        width = arguments["weights"][layer][0].shape[0]
        parts = [part and part[layer] or [None] * experts for part in (scales, shifts, means, variances)]
        made = [module(kind, width, eps[layer], *own) for own in zip(*parts, strict=True)] if kind != "none" else None
        norms.append(made)
    return {**arguments, "norms": norms}


def fused(**arguments: Any) -> Any:
    """The call with the modules of :func:`with_modules`, whose dropout is that of the formula."""
    made = with_modules(**arguments)
    seed(SEED)
    return mk.expert_mixture(**made)


def check(case: Case, backend: str, threads: int = 1) -> None:
    """A case of :func:`fused` by an implementation, held against the formula."""
    agreement.check(fused, formula, case, backend, threads, by_pytorch=by_pytorch, factor=FACTOR)


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
