"""What the level's launchers refuse, as the C++ kernels do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlkernels.ops._operands import check_count, check_gate_logits, check_operands
from mtlkernels.ops._triton import DTYPES
from mtlkernels.ops.level.reference import check_parts
from mtlkernels.ops.level.spec import BATCH_NORM, Groups, LevelSpec


def check_level(spec: LevelSpec, tensors: Sequence[Tensor | None], seed: Tensor | None) -> Groups:
    """The level's tensors, once all of them are what its kernels read.

    Raises:
        TypeError: a tensor of another dtype or layout.
        ValueError: one of another shape, on another device, or too few of them; dropout without a seed.
    """
    check_count("inputs, parameters and gates", tensors, spec.num_tensors, "of the level's tensors")
    groups = spec.split(tensors)
    check_parts(spec, groups)
    x = groups.inputs[0]
    if x.dtype not in DTYPES or x.dim() != 2:
        raise TypeError(f"inputs[0] must be [B, D] in {', '.join(map(str, DTYPES))}, got {x.dim()}-D in {x.dtype}")
    check_operands("inputs", groups.inputs, [tuple(x.shape)] * spec.num_inputs, x)
    widths = _widths(spec, groups)
    each = range(len(spec.expert_inputs))
    check_operands(
        "weights", groups.weights, [(widths[i + 1], widths[i]) for i in range(len(spec.layers)) for _ in each], x
    )
    of_channels = [(width,) for width in widths[1:] for _ in each]
    check_operands("biases", groups.biases, of_channels, x)
    own = (x.dtype, torch.float32)
    for name in ("scales", "shifts"):
        parts = getattr(groups, name)
        check_operands(name, parts, of_channels[: len(parts)], x, own)
    slopes = zip(groups.slopes, of_channels, strict=False)  # none at all where no activation has them
    shapes = [(1,) if slope is not None and slope.shape == (1,) else shape for slope, shape in slopes]
    check_operands("slopes", groups.slopes, shapes, x, own)
    if spec.gate_inputs:
        check_operands("gate_weights", groups.gates, [(size, widths[0]) for size in spec.gate_sizes], x)
        check_operands("gate_biases", groups.gate_biases, [(size,) for size in spec.gate_sizes], x)
    else:
        check_gate_logits(groups.gates, spec.gate_sizes, x.shape[0], x)
    if any(layer.dropout > 0 for layer in spec.layers):
        _check_seed(seed, x.device)
    return groups


def check_saved(
    spec: LevelSpec, groups: Groups, grad_outputs: Sequence[Tensor | None], saved: Sequence[Tensor]
) -> None:
    """The outputs' gradients and what the forward pass saved, of a level whose tensors have been checked."""
    x, gates = groups.inputs[0], len(spec.gate_sizes)
    rows, experts, widths = x.shape[0], len(spec.expert_inputs), _widths(spec, groups)
    if not grad_outputs or len(grad_outputs) % gates:
        raise ValueError(
            f"grad_outputs must hold an entry for each of {gates} gates, or as many for each of several losses,"
            f" got {len(grad_outputs)}"
        )
    check_operands("grad_outputs", grad_outputs, [(rows, widths[-1])] * len(grad_outputs), x)
    norms = [(layer.norm, width) for layer, width in zip(spec.layers, widths[1:], strict=True) if layer.norm]
    linear = len(spec.gate_inputs) > 0
    count = len(spec.layers) + len(spec.hidden_signs) + 2 * len(norms) + linear
    check_count("saved", saved, count, "of what the forward pass saves")
    stored, statistics, logits, signs = spec.split_saved(saved)
    check_operands("saved", stored, [(experts, rows, width) for width in widths[1:]], x)
    shapes = [(experts, width if norm == BATCH_NORM else rows) for norm, width in norms]
    check_operands("statistics", statistics, shapes * 2, x, (torch.float32,))
    words = [(experts, rows, count) for count in spec.sign_words(widths[1:])]
    check_operands("saved signs", signs, words, x, (torch.int32,))
    check_operands("saved logits", logits, [(rows, sum(spec.gate_sizes))] * linear, x)


def _widths(spec: LevelSpec, groups: Groups) -> list[int]:
    """Features in front of each layer and behind the last, by its first expert's weight."""
    found = [groups.inputs[0].shape[1]]
    for i, weight in enumerate(groups.weights[:: len(spec.expert_inputs)]):
        if weight.dim() != 2:
            raise ValueError(f"weights[{i * len(spec.expert_inputs)}] must be a matrix, got {weight.dim()} dimensions")
        found.append(weight.shape[0])
    return found


def _check_seed(seed: Tensor | None, device: torch.device) -> None:
    if seed is None:
        raise ValueError("dropout needs a seed, got None")
    check_operands("seed", [seed.flatten()], [(1,)], seed.new_empty(0, device=device), (torch.int64,))
