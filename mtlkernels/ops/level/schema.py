"""The operators of a level: schema, fake kernel and autocast.

A level's tensors travel in three lists, in the order of :class:`mtlkernels.ops.level.spec.Groups`: ``inputs``;
``parameters``, which are those of the experts; and ``gates``, logits or linear layers. Everything else about it is
``spec`` and ``numbers``, see :attr:`LevelSpec.encoded`. ``seed``, one int64, decides what is dropped, see
:mod:`mtlkernels.ops._random`. ``saved``, which ``level_forward`` returns behind its K outputs, is what
:meth:`LevelSpec.split_saved` takes apart. Every operator returns one list: graphs of Inductor's ``cpp_wrapper`` cannot
call one that returns several.

``grad_outputs`` are None for outputs that nobody used, and the backward operator returns the gradients of what the
others depend on, see :meth:`LevelSpec.returned`; ``needs`` is one for each kind of tensor. They may be those of several
losses, K of one after K of another, whose gradients are then returned apart.

``scales`` and ``shifts`` of ``level_serve`` are what batch norms by running statistics make of products, in the place
of their biases: an entry a layer, [E, H], and then an entry a linear gate, [N_k], None where there is none; float32, or
float64 beside float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtlkernels._library import cast_floats, define
from mtlkernels.ops.level.spec import LAYER_NORM, LevelSpec


def _forward(
    inputs: list[Tensor],
    parameters: list[Tensor | None],
    gates: list[Tensor | None],
    spec: list[int],
    numbers: list[float],
    seed: Tensor | None,
    save: bool,
) -> list[Tensor]:
    level, x = LevelSpec.decoded(spec, numbers), inputs[0]
    rows, experts = x.shape[0], len(level.expert_inputs)
    weights = level.split((*inputs, *parameters, *gates)).weights
    widths = [weight.shape[0] for weight in weights[::experts]]
    saved: list[Tensor] = []
    last = len(level.last_saved(x))
    if save:
        stacks = [experts] * (len(widths) - 1) + [last]
        saved = [x.new_empty((count, rows, width)) for count, width in zip(stacks, widths, strict=True) if count]
        if last and level.saves_panels(x):
            saved[-1] = saved[-1].flatten(1)
    norms = [(layer.norm, width) for layer, width in zip(level.layers, widths, strict=True) if layer.norm]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for norm, width in norms * 2:
        saved.append(x.new_empty((experts, rows if norm == LAYER_NORM else width), dtype=dtype))
    if save and level.saves_signs(x):
        saved.append(x.new_empty((experts - last, rows, -(-widths[-1] // 8)), dtype=torch.uint8))
    if save and x.device.type == "cuda":
        saved += [x.new_empty((experts, rows, words), dtype=torch.int32) for words in level.sign_words(widths)]
    if save and level.gate_inputs:
        saved.append(x.new_empty((rows, sum(level.gate_sizes))))
    return [*(x.new_empty((rows, widths[-1])) for _ in level.gate_sizes), *saved]


def _serve(
    inputs: list[Tensor],
    parameters: list[Tensor | None],
    gates: list[Tensor | None],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    spec: list[int],
    numbers: list[float],
) -> list[Tensor]:
    results = _forward(inputs, parameters, gates, spec, numbers, None, False)
    return results[: len(LevelSpec.decoded(spec, numbers).gate_sizes)]


def _backward(
    grad_outputs: list[Tensor | None],
    inputs: list[Tensor],
    parameters: list[Tensor | None],
    gates: list[Tensor | None],
    saved: list[Tensor],
    spec: list[int],
    numbers: list[float],
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    tensors: list[Any] = [*inputs, *parameters, *gates]
    returned = LevelSpec.decoded(spec, numbers).returned(grad_outputs, tensors, needs)
    return [tensors[at % len(tensors)].new_empty(tensors[at % len(tensors)].shape) for at in returned]


def _autocast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Casts what products take: inputs, weights and biases, and linear gates; norms, slopes and logits stay."""
    inputs, parameters, gates, spec, numbers, *rest = args
    level = LevelSpec.decoded(spec, numbers)
    linear = level.sizes.weights + level.sizes.biases
    cast_parameters = [*cast_floats(parameters[:linear], dtype), *parameters[linear:]]
    return (
        cast_floats(inputs, dtype),
        cast_parameters,
        cast_floats(gates, dtype) if level.gate_inputs else gates,
        spec,
        numbers,
        *rest,
    )


def _autocast_serving(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The same; scales and shifts stay."""
    *cast, spec, numbers = _autocast((*args[:3], *args[5:]), dtype)
    return (*cast, *args[3:5], spec, numbers)


define("level_forward", _forward, _autocast)
define("level_serve", _serve, _autocast_serving)
define("level_backward", _backward)
