"""The arguments of expert_mixture but its gates, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mtlkernels.ops._checks import check_routing
from mtlkernels.ops.expert_mixture.checks import (
    activation_codes,
    check_biases,
    check_inputs,
    check_slopes,
    check_weights,
)
from mtlkernels.ops.normalized_mixture.norms import Norm, check_dropout, check_norms


class Arguments(NamedTuple):
    """Streams; then by layer: weights, activations, norms, dropout and eps; biases and slopes by layer, then expert."""

    streams: list[Tensor]
    layers: list[list[Tensor]]
    biases: list[Tensor | None]
    codes: tuple[int, ...]
    norms: list[Norm | None]
    dropout: tuple[float, ...]
    slopes: list[Tensor | None]
    dice_eps: tuple[float, ...]


def check_arguments(
    inputs: Any,
    weights: Any,
    biases: Any,
    routing: Any,
    activation: Any,
    norms: Any,
    dropout: Any,
    slopes: Any,
    dice_eps: Any,
) -> Arguments:
    """See :func:`mtlkernels.expert_mixture`."""
    check_routing(routing)
    streams = check_inputs(inputs, routing)
    x = streams[0]
    layers = check_weights(weights, routing, x)
    bias_list = check_biases(biases, layers, routing, x)
    codes = activation_codes(activation, len(layers))
    layer_norms = check_norms(norms, layers, routing, x)
    rates = check_dropout(dropout, len(layers))
    slope_list, epsilons = check_slopes(slopes, dice_eps, codes, layers, routing, x)
    return Arguments(streams, layers, bias_list, codes, layer_norms, rates, slope_list, epsilons)
