"""Levels in graphs that nobody differentiates: the operator ``level_serve``.

A graph of ``level_forward`` folds batch norms by running statistics into new copies of all weights at each call, which
takes longer than a level of few rows. This operator takes what they make of a product, a scale and a shift a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mtlkernels._backends import register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import example_by_example, of_no_examples
from mtlkernels.ops.level import reference, schema  # noqa: F401  (it defines the operators)
from mtlkernels.ops.level.autograd import vmap_operator
from mtlkernels.ops.level.spec import LevelSpec

_Lists = Sequence[Sequence[Tensor | None]]


def folded(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    spec: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Any, Any, Any, Any, Any]:
    """The arguments of ``level_forward`` up to the seed: scales in weights, shifts as biases.

    Raises:
        ValueError: scales and shifts are not those of the level's layers and linear gates.
    """
    level = LevelSpec.decoded(spec, numbers)
    groups = level.split((*inputs, *parameters, *gates))
    layers, linear, experts = len(level.layers), len(level.gate_inputs), len(level.expert_inputs)
    for name, found in (("scales", scales), ("shifts", shifts)):
        if len(found) != layers + linear:
            raise ValueError(
                f"{name} must hold an entry for each of {layers} layers and {linear} linear gates, got {len(found)}"
            )
    weights: list[Any] = [*groups.weights, *(groups.gates if linear else ())]
    biases: list[Any] = [*groups.biases, *groups.gate_biases]
    for i, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
        if (scale is None) != (shift is None):
            raise ValueError(f"scales[{i}] and shifts[{i}] must both be there, or none of them")
        if scale is None or shift is None:
            continue
        first, count = (i * experts, experts) if i < layers else (layers * (experts - 1) + i, 1)
        shape = [experts, len(weights[first])] if i < layers else [len(weights[first])]
        for name, tensor in (("scales", scale), ("shifts", shift)):
            if list(tensor.shape) != shape:
                raise ValueError(f"{name}[{i}] must have shape {shape}, got {list(tensor.shape)}")
        rows = (scale, shift) if i < layers else (scale.unsqueeze(0), shift.unsqueeze(0))
        for at, s, t in zip(range(first, first + count), *rows, strict=True):
            if biases[at] is not None:
                raise ValueError("the bias before a shift must be None, as that has it")
            weights[at] = (weights[at] * s.unsqueeze(1)).to(weights[at].dtype)
            biases[at] = t.to(weights[at].dtype)
    each = layers * experts
    of_gates = (*weights[each:], *biases[each:]) if linear else groups.gates
    own = (*weights[:each], *biases[:each], *groups.scales, *groups.shifts, *groups.slopes)
    return list(inputs), list(own), list(of_gates), list(spec), list(numbers)


def served(forward: Callable[..., Sequence[Tensor]], args: Sequence[Any]) -> list[Tensor]:
    """The outputs of ``forward``, an implementation of ``level_forward``, for arguments of ``level_serve``."""
    given = folded(*args)
    return list(LevelSpec.decoded(*given[3:]).split_results(forward(*given, None, False))[0])


def serve(*args: Any) -> list[Tensor]:
    """The operator in PyTorch."""
    return served(reference.forward, args)


def _differentiable(*args: Any) -> list[Tensor]:
    return served(torch.ops.mtlkernels.level_forward, args)


@torch.library.register_vmap("mtlkernels::level_serve")
@of_no_examples
def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    lists: _Lists = args[:5]
    if all(scale is None for scale in lists[3]):  # a rule that does the examples at once
        found = vmap_operator(info, (*in_dims[:3], *[None] * 4), *lists[:3], *args[5:], None, False)
        count = len(LevelSpec.decoded(*args[5:]).gate_sizes)
        return tuple(part[:count] for part in found)
    dims = [dim for own, ts in zip(in_dims, lists, strict=False) for dim in (own or [None] * len(ts))]

    def run(*tensors: Any) -> Any:
        values = iter(tensors)
        return torch.ops.mtlkernels.level_serve(*([next(values) for _ in ts] for ts in lists), *args[5:])

    out, out_dims = example_by_example(run, info.batch_size, dims, list(chain(*lists)))
    return list(out), list(out_dims)


register_reference("level", "serve", serve)
register_autograd("level_serve", _differentiable)
