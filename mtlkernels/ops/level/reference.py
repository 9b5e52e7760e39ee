"""A level in PyTorch: the specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels.ops import activations as act
from mtlkernels.ops._random import dropout_factors
from mtlkernels.ops.gated_mixture import reference as mixture
from mtlkernels.ops.level.spec import BATCH_NORM, Groups, Layer, LevelSpec, Reached

_GROUP = 16  # rows of a panel, kGroup in C++


class _Values(NamedTuple):
    """What becomes of the pre-activations of a layer, each [E, B, H] and in the dtype of accumulation.

    ``standardized`` are they themselves without a norm; the activation's derivative follows from ``kept``, its input or
    its output; ``factors`` are dropout's, ``slopes`` [E, 1, H] the activation's; and ``hidden``, in the dtype of the
    inputs, is what the next layer reads.
    """

    standardized: Tensor
    kept: Tensor
    factors: Tensor | None
    slopes: Tensor | None
    hidden: Tensor


def statistics(norm: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of pre-activations [E, B, H]: [E, H] of a batch norm, [E, B] of a layer norm."""
    mean = z.mean(norm, keepdim=True)
    return mean.squeeze(norm), (z - mean).square().mean(norm)


def check_parts(spec: LevelSpec, groups: Groups) -> None:
    """Refuses parameters of a norm or slopes for a layer that has none: whoever gives them would wait for gradients."""
    experts = len(spec.expert_inputs)
    for name in ("scales", "shifts", "slopes"):
        for i, part in enumerate(getattr(groups, name)):
            layer = spec.layers[i // experts]
            has = act.has_slopes(layer.activation) if name == "slopes" else layer.norm
            if part is not None and not has:
                lack = "an activation without slopes" if name == "slopes" else "no norm"
                raise ValueError(f"{name}[{i}] must be None, as its layer has {lack}")


def _affine(parts: Sequence[Tensor | None], default: float, like: Tensor) -> Tensor:
    """The experts' scales, shifts or slopes as [E, 1, H], ``default`` for an expert without any."""
    width = like.shape[2]
    filled = [like.new_full((width,), default) if part is None else part.to(like.dtype).expand(width) for part in parts]
    return torch.stack(filled).unsqueeze(1)


def _of_layer(spec: LevelSpec, groups: Groups, number: int) -> Groups:
    """The parameters of one layer's experts."""
    experts = len(spec.expert_inputs)
    run = slice(number * experts, (number + 1) * experts)
    return groups._replace(**{name: getattr(groups, name)[run] for name in Groups._fields[1:6]})


def _values(
    spec: LevelSpec, number: int, z: Tensor, stats: Sequence[Tensor], parameters: Groups, seed: Tensor | None
) -> _Values:
    """``parameters`` are those of the layer; ``stats`` the mean and the variance of its norm, empty without one."""
    layer = spec.layers[number]
    standardized = normalized = z.to(mixture.accumulation_dtype(z))
    if layer.norm:
        mean, variance = (value.unsqueeze(layer.norm) for value in stats)
        standardized = (standardized - mean) * torch.rsqrt(variance + layer.eps)
        scale, shift = (_affine(parameters[3], 1.0, standardized), _affine(parameters[4], 0.0, standardized))
        normalized = standardized * scale + shift
    slopes = _affine(parameters.slopes, 1.0, normalized) if act.has_slopes(layer.activation) else None
    activated = act.activate(layer.activation, normalized, slopes, layer.dice_eps)
    kept = normalized if act.from_input(layer.activation) else activated
    factors = _dropout(spec, number, z, seed)
    hidden = activated if factors is None else activated * factors
    return _Values(standardized, kept, factors, slopes, hidden.to(z.dtype))


def _dropout(spec: LevelSpec, number: int, z: Tensor, seed: Tensor | None) -> Tensor | None:
    """What dropout multiplies a layer's activations [E, B, H] by, None without dropout."""
    rate = spec.layers[number].dropout
    if rate == 0 or seed is None:
        return None
    return dropout_factors(seed, number, spec.numbers, (z.shape[1], z.shape[2]), rate, mixture.accumulation_dtype(z))


def _products(groups: Groups, hidden: Sequence[Tensor]) -> Tensor:
    """The pre-activations [E, B, H] of a layer with these parameters."""
    return torch.stack([F.linear(*operands) for operands in zip(hidden, groups.weights, groups.biases, strict=True)])


def gate_logits(spec: LevelSpec, groups: Groups) -> list[Tensor]:
    """The K gates' logits [B, N_k]."""
    if not spec.gate_inputs:
        return list(groups.gates)
    read = [groups.inputs[stream] for stream in spec.gate_inputs]
    return [F.linear(*operands) for operands in zip(read, groups.gates, groups.gate_biases, strict=True)]


def evaluate(
    spec: LevelSpec, groups: Groups, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[_Values], list[Tensor]]:
    """Outputs, pre-activations, what becomes of them, and statistics: all means, then all variances."""
    hidden = [groups.inputs[stream] for stream in spec.expert_inputs]
    before, values = [], []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for number, layer in enumerate(spec.layers):
        parameters = _of_layer(spec, groups, number)
        z = _products(parameters, hidden)
        stats = statistics(layer.norm, z.to(mixture.accumulation_dtype(z))) if layer.norm else ()
        means += stats[:1]
        variances += stats[1:]
        before.append(z)
        values.append(_values(spec, number, z, stats, parameters, seed))
        hidden = list(values[-1].hidden.unbind(0))
    logits = gate_logits(spec, groups)
    outputs = mixture.forward(torch.stack(hidden, dim=1), logits, spec.gate_experts, spec.gate_sizes)
    return outputs, before, values, means + variances


def forward(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    spec: Sequence[int],
    numbers: Sequence[float],
    seed: Tensor | None,
    save: bool,
) -> list[Tensor]:
    """Every expert is an MLP, ``x <- dropout(activation(norm(x W^T + b)))`` a layer; every gate mixes its experts.

    Returns the K outputs [B, H_L], then what :meth:`LevelSpec.split_saved` takes apart. Between two products all is in
    the dtype of accumulation. Saved are, with ``save``, the pre-activations [E, B, H] of each layer before its norm, if
    ``stores_inputs`` is true; otherwise, for each layer, the output of the activation, or its input where its
    derivative follows from that, of the last layer that of the experts ``last_saved`` and of the others signs, where
    ``saves_signs`` is true; and on GPUs ``hidden_signs``. Statistics are saved always, logits of linear gates with
    ``save``.
    """
    level = LevelSpec.decoded(spec, numbers)
    groups = level.split((*inputs, *parameters, *gates))
    check_parts(level, groups)
    outputs, before, values, stats = evaluate(level, groups, seed)
    saved: list[Tensor] = []
    if save and level.stores_inputs:
        saved = before
    elif save:
        kept = zip(level.layers, before, values, strict=True)
        saved = [z if act.from_input(layer.activation) else value.hidden for layer, z, value in kept]
        last = level.last_saved(inputs[0])
        others = [e for e in range(len(level.expert_inputs)) if e not in last]
        if others:
            saved[-1:] = [saved[-1][list(last)]] if last else []
        if last and level.saves_panels(inputs[0]):
            saved[-1] = panels(saved[-1])
        if level.saves_signs(inputs[0]):
            saved.append(signs(values[-1].hidden[others]))
        if inputs[0].is_cuda:
            saved += [signs(values[i].hidden, 32).view(torch.int32) for i in level.hidden_signs]
    logits = [torch.cat(gate_logits(level, groups), 1)] if save and level.gate_inputs else []
    return [*outputs, *saved, *stats, *logits]


def panels(values: Tensor) -> Tensor:
    """Values [E, B, H] as kernels on CPUs want a last layer [E, B * H]: each full group of 16 rows lies as [H, 16]."""
    full = values.shape[1] // _GROUP
    groups, rest = values[:, : full * _GROUP], values[:, full * _GROUP :]
    groups = groups.unflatten(1, (full, _GROUP)).transpose(2, 3)
    return torch.cat((groups.flatten(1), rest.flatten(1)), 1)


def rows_of_panels(values: Tensor, rows: int, width: int) -> Tensor:
    """The values [E, rows, width] of :func:`panels`."""
    experts, full = values.shape[0], rows // _GROUP
    groups, rest = values.split((full * _GROUP * width, rows % _GROUP * width), 1)
    groups = groups.reshape(experts, full, width, _GROUP).transpose(2, 3).reshape(experts, full * _GROUP, width)
    return torch.cat((groups, rest.reshape(experts, rows % _GROUP, width)), 1)


def signs(outputs: Tensor, multiple: int = 8) -> Tensor:
    """Which of the outputs [E, B, H] are not <= 0, as :meth:`LevelSpec.last_saved` describes it.

    Bits up to a ``multiple`` of H are 0.
    """
    flags = F.pad((~(outputs <= 0)).to(torch.uint8), (0, -outputs.shape[2] % multiple))
    places = torch.arange(8, dtype=torch.uint8, device=outputs.device)
    return torch.bitwise_left_shift(flags.unflatten(2, (flags.shape[2] // 8, 8)), places).sum(3, dtype=torch.uint8)


def _of_part(spec: LevelSpec, stacked: Tensor) -> Tensor:
    """What is stacked over a whole level's experts, of those of a part."""
    return stacked if spec.numbers == tuple(range(stacked.shape[0])) else stacked[list(spec.numbers)]


def _from_saved(spec: LevelSpec, groups: Groups, saved: Sequence[Tensor], seed: Tensor | None) -> list[_Values]:
    """What :func:`evaluate` found, from what the forward pass saved of a level of which this may be a part."""
    stored, stats, *_ = spec.split_saved(saved)
    means = iter(stats[: len(stats) // 2])
    variances = iter(stats[len(stats) // 2 :])
    values: list[_Values] = []
    for number, layer in enumerate(spec.layers):
        parameters = _of_layer(spec, groups, number)
        if number < len(stored):
            z = stored[number]
            if z.dim() == 2:
                z = rows_of_panels(z, groups.inputs[0].shape[0], parameters.weights[0].shape[0])
            z = _of_part(spec, z)
        else:
            z = _products(parameters, values[-1].hidden.unbind(0))
        own = [_of_part(spec, next(part)) for part in (means, variances)] if layer.norm else []
        if number < len(stored) and not spec.stores_inputs and not act.from_input(layer.activation):
            values.append(_Values(z, z.to(mixture.accumulation_dtype(z)), None, None, z))
        else:
            values.append(_values(spec, number, z, own, parameters, seed))
    return values


def _layer_gradients(
    layer: Layer, value: _Values, stats: Tensor | None, scales: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradient of a layer's output those of its pre-activations, and of scales, shifts and slopes [E, H].

    With s the standardized pre-activation, g the gradient of ``s * scale + shift``, and means over what the statistics
    were taken of: dz = rstd * (g * scale - mean(g * scale) - s * mean(g * scale * s)). ``stats`` is the variance.
    """
    grads: dict[str, Tensor] = {}
    g = grad.to(value.kept.dtype)
    if value.factors is not None:
        g = g * value.factors
    if value.slopes is None:
        g = act.gradient(layer.activation, g, value.kept)
    else:
        g, elements = act.gradients_with_slopes(layer.activation, g, value.kept, value.slopes, layer.dice_eps)
        grads["slopes"] = elements.sum(1)
    if stats is not None:
        s = value.standardized
        grads["scales"], grads["shifts"] = (g * s).sum(1), g.sum(1)
        g = g * _affine(scales, 1.0, g)
        g = g - g.mean(layer.norm, keepdim=True) - s * (g * s).mean(layer.norm, keepdim=True)
        g = g * torch.rsqrt(stats.unsqueeze(layer.norm) + layer.eps)
    return g, grads


class Asked(NamedTuple):
    """What a backward call asks for: the ``part`` of a ``level`` on which the outputs with a gradient depend.

    ``groups`` are the part's tensors, ``grad_outputs`` the gradients that there are, ``needs`` says of each kind
    whether any gradient of it is returned, ``returned`` of each of the part's tensors whether its is.
    """

    level: LevelSpec
    part: Reached
    groups: Groups
    grad_outputs: list[Tensor]
    needs: Groups
    returned: list[bool]

    def pick(self, grads: Iterable[Any]) -> list[Any]:
        """Those that are returned, in that order, from a gradient or None for each of the part's tensors."""
        found = zip(self.part.places, grads, self.returned, strict=True)
        return [grad for _, grad, flag in sorted(found, key=lambda entry: entry[0]) if flag]


def asked_for(
    grad_outputs: Sequence[Tensor | None], tensors: Any, spec: Sequence[int], numbers: Sequence[float], needs: Any
) -> Asked | None:
    """What a call of the backward operator asks for, once its arguments have been checked; None if it is nothing."""
    level = LevelSpec.decoded(spec, numbers)
    whole = level.split(tensors)
    check_parts(level, whole)
    part = level.reached(grad is not None for grad in grad_outputs)
    wanted = set(level.returned(grad_outputs, tensors, needs))
    if not wanted:
        return None
    returned = [at in wanted for at in part.places]
    groups = part.pick(whole)
    of_kinds = Groups(*map(any, part.spec.split(returned)))
    present = [grad for grad in grad_outputs if grad is not None]
    return Asked(level, part, groups, present, of_kinds, returned)


def backward(
    grad_outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    spec: Sequence[int],
    numbers: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that :meth:`LevelSpec.returned` names, in its order: of one loss after another.

    Only the part of the level on which a loss's outputs with a gradient depend is evaluated.
    """
    tensors, each = (*inputs, *parameters, *gates), len(LevelSpec.decoded(spec, numbers).gate_sizes)
    result: list[Tensor] = []
    for start in range(0, len(grad_outputs), each):
        asked = asked_for(grad_outputs[start : start + each], tensors, spec, numbers, needs)
        if asked is None:
            continue
        found = _gradients(asked.part.spec, asked.groups, asked.grad_outputs, saved, seed, asked.needs)
        result += [_like(*pair) for pair in zip(asked.pick(found), asked.pick(chain(*asked.groups)), strict=True)]
    return result


def _gradients(
    spec: LevelSpec,
    groups: Groups,
    grad_outputs: Sequence[Any],
    saved: Sequence[Tensor],
    seed: Tensor | None,
    needs: Any,
) -> list[Any]:
    """Of each tensor of a level, all of whose outputs have gradients; None for kinds that are not needed."""
    values = _from_saved(spec, groups, saved, seed)
    stats = spec.split_saved(saved)[1]
    variances = iter(reversed(stats[len(stats) // 2 :]))
    logits = gate_logits(spec, groups)
    last = values[-1].hidden.transpose(0, 1)
    gates = (spec.gate_experts, spec.gate_sizes)
    grad_experts, *grad_logits = mixture.backward(grad_outputs, last, logits, *gates, True, True)
    grad = grad_experts.transpose(0, 1)
    experts = len(spec.expert_inputs)
    found = Groups(*([None] * size for size in spec.sizes))
    for number in reversed(range(len(spec.layers))):
        layer, parameters = spec.layers[number], _of_layer(spec, groups, number)
        run = slice(number * experts, (number + 1) * experts)
        variance = _of_part(spec, next(variances)) if layer.norm else None
        dz, others = _layer_gradients(layer, values[number], variance, parameters.scales, grad)
        for name, part in others.items():
            getattr(found, name)[run] = [row.clone() for row in part]
        dz = dz.to(groups.inputs[0].dtype)
        if needs.weights:
            below = values[number - 1].hidden if number else [groups.inputs[stream] for stream in spec.expert_inputs]
            found.weights[run] = [dz[e].t() @ below[e] for e in range(experts)]
        # A constant does not move what a batch norm gives; a NaN stays.
        found.biases[run] = [part.sum(0) * 0 if layer.norm == BATCH_NORM else part.sum(0) for part in dz]
        if number or needs.inputs:
            grad = torch.stack([dz[e] @ weight for e, weight in enumerate(parameters.weights)])
    if needs.inputs:
        found.inputs[:] = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in groups.inputs]
        for e, stream in enumerate(spec.expert_inputs):
            found.inputs[stream] += grad[e]
    for k, (part, weight) in enumerate(zip(grad_logits, groups.gates, strict=True)):
        if not spec.gate_inputs:
            found.gates[k] = part
            continue
        stream = spec.gate_inputs[k]
        found.gates[k], found.gate_biases[k] = part.t() @ groups.inputs[stream], part.sum(0)
        if needs.inputs:
            found.inputs[stream] = torch.addmm(found.inputs[stream], part, weight)
    return [grad for group in found for grad in group]


def _like(grad: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in its tensor's shape and dtype: of a slope for all channels their sum."""
    if grad.shape == tensor.shape and grad.dtype == tensor.dtype:
        return grad.contiguous()
    return grad.sum_to_size(tensor.shape).to(tensor.dtype, copy=True)
