"""Normalized mixture in PyTorch: the specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels.ops import activations as act
from mtlkernels.ops._random import dropout_factors
from mtlkernels.ops.gated_mixture import reference as mixture

# The code of a norm is the dimension of the pre-activations [E, B, H] over which its statistics are taken.
BATCH_NORM, LAYER_NORM = 1, 2


class _Layer(NamedTuple):
    """What becomes of the pre-activations of a layer, each [E, B, H] and in the dtype of accumulation.

    ``standardized`` are they themselves without a norm; ``activated`` is the activation of ``normalized``, ``factors``
    are dropout's, ``slopes`` [E, 1, H] the activation's, and ``hidden``, in the dtype of the inputs, is what the next
    layer reads.
    """

    standardized: Tensor
    normalized: Tensor
    activated: Tensor
    factors: Tensor | None
    slopes: Tensor | None
    hidden: Tensor


def statistics(norm: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of pre-activations [E, B, H]: [E, H] of a batch norm, [E, B] of a layer norm."""
    mean = z.mean(norm, keepdim=True)
    return mean.squeeze(norm), (z - mean).square().mean(norm)


def check_parts(
    activations: Sequence[int],
    norms: Sequence[int],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
) -> None:
    """Refuses parameters of a norm or slopes for a layer that has none: whoever gives them would wait for gradients."""
    experts = len(scales) // len(norms)
    sloped = [act.has_slopes(code) for code in activations]
    for name, parts, has, lack in (
        ("scales", scales, norms, "no norm"),
        ("shifts", shifts, norms, "no norm"),
        ("slopes", slopes, sloped, "an activation without slopes"),
    ):
        for i, part in enumerate(parts):
            if part is not None and not has[i // experts]:
                raise ValueError(f"{name}[{i}] must be None, as its layer has {lack}")


def _affine(parts: Sequence[Tensor | None], default: float, like: Tensor) -> Tensor:
    """The experts' scales, shifts or slopes as [E, 1, H], ``default`` for an expert without any."""
    width = like.shape[2]
    filled = [like.new_full((width,), default) if part is None else part.to(like.dtype).expand(width) for part in parts]
    return torch.stack(filled).unsqueeze(1)


class _Settings(NamedTuple):
    """What follows the product of a layer; ``number`` counts the layers."""

    number: int
    activation: int
    norm: int
    eps: float
    dice_eps: float
    rate: float
    seed: Tensor | None


def _layer(
    z: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    settings: _Settings,
) -> _Layer:
    acc = mixture.accumulation_dtype(z)
    norm, code = settings.norm, settings.activation
    standardized = normalized = z.to(acc)
    if statistics is not None:
        mean, variance = (value.unsqueeze(norm) for value in statistics)
        standardized = (standardized - mean) * torch.rsqrt(variance + settings.eps)
        normalized = standardized * _affine(scales, 1.0, standardized) + _affine(shifts, 0.0, standardized)
    own = _affine(slopes, 1.0, normalized) if act.has_slopes(code) else None
    activated = hidden = act.activate(code, normalized, own, settings.dice_eps)
    factors = None
    if settings.rate > 0 and settings.seed is not None:
        sizes = (z.shape[0], z.shape[1], z.shape[2])
        factors = dropout_factors(settings.seed, settings.number, sizes, settings.rate, acc)
        hidden = activated * factors
    return _Layer(standardized, normalized, activated, factors, own, hidden.to(z.dtype))


def forward(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    norms: Sequence[int],
    eps: Sequence[float],
    dice_eps: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Every expert is an MLP, ``x <- dropout(activation(norm(x W^T + b)))`` a layer; every gate mixes its experts.

    Returns the K outputs [B, H_L], the pre-activations [E, B, H] of each layer before its norm, and of each layer that
    has a norm the mean and the biased variance. Between two products all is in the dtype of accumulation.
    """
    check_parts(activations, norms, scales, shifts, slopes)
    experts = len(expert_inputs)
    hidden = [inputs[stream] for stream in expert_inputs]
    saved, means, variances = [], [], []
    for layer, norm in enumerate(norms):
        own = slice(layer * experts, (layer + 1) * experts)
        products = zip(hidden, weights[own], biases[own], strict=True)
        z = torch.stack([F.linear(x, weight, bias) for x, weight, bias in products])
        saved.append(z)
        found = statistics(norm, z.to(mixture.accumulation_dtype(z))) if norm else None
        if found is not None:
            means.append(found[0])
            variances.append(found[1])
        settings = _Settings(layer, activations[layer], norm, eps[layer], dice_eps[layer], dropout[layer], seed)
        hidden = list(_layer(z, found, scales[own], shifts[own], slopes[own], settings).hidden.unbind(0))
    outputs = mixture.forward(torch.stack(hidden, dim=1), gate_logits, gate_experts, gate_sizes)
    return outputs, saved, means, variances


def backward(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    saved: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    norms: Sequence[int],
    eps: Sequence[float],
    dice_eps: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_norms: bool,
    need_slopes: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of inputs, weights, biases (one a weight), scales, shifts and slopes (one each that there is), logits.

    With s the standardized pre-activation, g the gradient of ``s * scale + shift``, and means over what the statistics
    were taken of: dz = rstd * (g * scale - mean(g * scale) - s * mean(g * scale * s)).
    """
    check_parts(activations, norms, scales, shifts, slopes)
    experts, dtype = len(expert_inputs), inputs[0].dtype
    found = iter(zip(means, variances, strict=True))
    stats = [next(found) if norm else None for norm in norms]
    owns = [slice(layer * experts, (layer + 1) * experts) for layer in range(len(norms))]
    each = zip(range(len(norms)), activations, norms, eps, dice_eps, dropout, [seed] * len(norms), strict=True)
    layers = [
        _layer(saved[i], stats[i], scales[own], shifts[own], slopes[own], _Settings(*settings))
        for i, (own, settings) in enumerate(zip(owns, each, strict=True))
    ]
    grad_experts, grad_logits = mixture.backward(
        grad_outputs, layers[-1].hidden.transpose(0, 1), gate_logits, gate_experts, gate_sizes, True, need_logits
    )
    grad = grad_experts[0].transpose(0, 1)
    grad_weights, grad_biases = [torch.empty(0)] * len(weights), [torch.empty(0)] * len(weights)
    grad_scales: list[Tensor | None] = [None] * len(weights)
    grad_shifts: list[Tensor | None] = [None] * len(weights)
    grad_slopes: list[Tensor | None] = [None] * len(weights)
    for i in reversed(range(len(norms))):
        at, layer, stat, norm = owns[i], layers[i], stats[i], norms[i]
        g = grad.to(layer.activated.dtype)
        if layer.factors is not None:
            g = g * layer.factors
        if layer.slopes is not None:
            g, elements = act.gradients_with_slopes(activations[i], g, layer.normalized, layer.slopes, dice_eps[i])
            grad_slopes[at] = elements.sum(1).unbind(0)
        else:
            kept = layer.normalized if act.from_input(activations[i]) else layer.activated
            g = act.gradient(activations[i], g, kept)
        if stat is not None:
            s = layer.standardized
            grad_scales[at], grad_shifts[at] = (g * s).sum(1).unbind(0), g.sum(1).unbind(0)
            g = g * _affine(scales[at], 1.0, g)
            g = g - g.mean(norm, keepdim=True) - s * (g * s).mean(norm, keepdim=True)
            g = g * torch.rsqrt(stat[1].unsqueeze(norm) + eps[i])
        dz = g.to(dtype)
        below = layers[i - 1].hidden if i else [inputs[stream] for stream in expert_inputs]
        if need_weights:
            grad_weights[at] = [dz[e].t() @ below[e] for e in range(experts)]
        if need_biases:  # a constant does not move what a batch norm gives; a NaN stays
            grad_biases[at] = [part.sum(0) * 0 if norm == BATCH_NORM else part.sum(0) for part in dz]
        if i or need_inputs:
            grad = torch.stack([dz[e] @ weight for e, weight in enumerate(weights[at])])
    grad_inputs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs] if need_inputs else []
    if need_inputs:
        for e, stream in enumerate(expert_inputs):
            grad_inputs[stream] += grad[e]
    return (
        grad_inputs,
        grad_weights if need_weights else [],
        grad_biases if need_biases else [],
        _of_those(grad_scales, scales) if need_norms else [],
        _of_those(grad_shifts, shifts) if need_norms else [],
        _of_those(grad_slopes, slopes) if need_slopes else [],
        grad_logits,
    )


def _of_those(grads: Sequence[Tensor | None], parameters: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the scales, shifts or slopes that there are; zero where nobody reads one."""
    return [
        torch.zeros_like(parameter)
        if grad is None
        else grad.sum_to_size(parameter.shape).to(parameter.dtype, copy=True)
        for grad, parameter in zip(grads, parameters, strict=True)
        if parameter is not None
    ]
