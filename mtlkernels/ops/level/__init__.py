"""A level: experts and the gates that mix them, evaluated in one fused operator.

The public function is :func:`mtlkernels.expert_mixture`; :mod:`mtlkernels.ops.level.spec` says what a level is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _decisions, _torch
from mtlkernels.ops._call import needs_plain, why_checked
from mtlkernels.ops._checks import Tensors
from mtlkernels.ops.level import checkpointed, plain
from mtlkernels.ops.level.call import evaluate
from mtlkernels.ops.level.checks import check_arguments
from mtlkernels.ops.level.direct import OBSERVED, direct, note_direct
from mtlkernels.routing import Routing

PerExpert = Tensor | Tensors


def expert_mixture(
    inputs: Tensor | Tensors,
    weights: Sequence[PerExpert] | nn.ParameterList,
    biases: Sequence[PerExpert | None] | nn.ParameterList | None,
    gate_logits: Tensor | Tensors | None,
    routing: Routing,
    *,
    activation: str | Sequence[str] = "relu",
    gate_weights: Tensor | Tensors | None = None,
    gate_biases: Tensor | Sequence[Tensor | None] | nn.ParameterList | None = None,
    gate_norms: Sequence[nn.Module | None] | nn.ModuleList | None = None,
    norms: Sequence[Sequence[nn.Module] | nn.ModuleList | None] | nn.ModuleList | None = None,
    dropout: float | Sequence[float] = 0.0,
    slopes: Sequence[PerExpert | None] | nn.ParameterList | None = None,
    dice_eps: float | Sequence[float] = 1e-3,
) -> tuple[Tensor, ...]:
    """Evaluates every expert of a level and mixes them by every gate, without storing the experts' outputs.

    Each expert is an MLP, ``x <- activation(x W^T + b)`` a layer, the last one included; gate k returns
    ``y_k = sum_e softmax(logits_k)_e * expert_e`` over the experts that it sees. With ``Routing.mmoe`` this is a level
    of MMoE (Ma et al., KDD 2018), with ``Routing.cgc`` one of PLE (Tang et al., RecSys 2020). Differentiable in
    ``inputs``, ``weights``, ``biases`` and ``gate_logits``. An expert that no gate mixes is not evaluated, and its
    gradients are zero. Where a loss reads some of the outputs, the backward pass runs what these depend on, and the
    rest keeps no gradient. The softmax and the sums are in float32 (float64 for float64 inputs).

    With ``norms`` or ``dropout`` a layer is ``x <- dropout(activation(norm(x W^T + b)))``. Where a batch norm uses its
    running statistics, it is a scale and a shift behind the product, or folded into weight and bias. Otherwise, and
    where an activation has ``slopes``, the pre-activations are stored once, and whoever reads them normalizes,
    activates and drops; what is dropped is not stored but drawn again for the gradients.

    Each call uses the values that are in memory then, whoever wrote them: nothing made of a parameter or a statistic is
    kept from one call to the next.

    Args:
        inputs: [B, D], which every expert reads, or a sequence of G tensors [B, D], of which expert e reads number
            ``routing.expert_inputs[e]``. float32, bfloat16, float16 or float64; any strides.
        weights: one entry a layer, each [E, H_out, H_in] or a sequence of E tensors [H_out, H_in] (``nn.Linear``'s).
        biases: one entry a layer, each [E, H_out] or a sequence of E tensors [H_out]; None for a layer, or for all,
            means no bias.
        gate_logits: K tensors [B, N_k], in the order of ``routing.gate_experts[k]``, or one tensor [B, sum N_k].
            Any of the four dtypes; float64 only with float64 ``inputs``. None with ``gate_weights``.
        routing: which expert reads which stream, and which gate mixes which experts.
        activation: "relu", "leaky_relu" (slope 0.01), "gelu" (exact), "silu", "tanh", "sigmoid", "none", "prelu"
            (He et al., ICCV 2015) or "dice", or a sequence of these, one a layer. "dice" is torch-rechub's: x (p + (1 -
            p) a) with p = sigmoid((x - mean) / sqrt(sum((x - mean)^2 + dice_eps))) over the features of a row.
        gate_weights: K tensors [N_k, D] (``nn.Linear``'s), or one [sum N_k, D], in the place of logits that are a
            linear layer of the input: gate k reads ``inputs[k]``, or the only input. A level is then one call.
        gate_biases: beside ``gate_weights``, K tensors [N_k] or None, or one [sum N_k]; None for no bias.
        gate_norms: beside ``gate_weights``, K modules ``nn.BatchNorm1d`` of N_k features behind the linear layers, or
            None; each uses its running statistics. Gates that take a batch's give their logits.
        norms: an entry a layer: E modules ``nn.BatchNorm1d`` or E ``nn.LayerNorm``, or None; of one kind and eps
            within a layer. Modes and parameters are read from the modules, and running statistics are brought up to
            date as the modules themselves do, except those of an expert that no gate mixes.
        dropout: a rate in [0, 1], or one a layer; a caller passes 0 in evaluation. The seed comes from torch's default
            generator of the device.
        slopes: an entry a layer, those of "prelu" and "dice": [E, H] or [E, 1], or a sequence of E tensors [H] or [1];
            None for a layer with another activation. Of the dtype of ``inputs``, or float32 beside lower precision.
            Differentiable.
        dice_eps: a positive number, or one a layer.

    Returns:
        K tensors [B, H_L] of the dtype of ``inputs``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes, devices, the number of layers, streams, experts or gates do not agree, an activation is
            unknown, a rate is not in [0, 1], or a batch norm is to take the statistics of fewer than two rows.
    """
    of_gates = (gate_logits, gate_weights, gate_biases, gate_norms)
    found: Any = direct(inputs, weights, biases, of_gates, routing, activation, norms, dropout, slopes, dice_eps)
    if type(found) is tuple:
        if _decisions.on:
            note_direct(inputs)
    else:
        gates = (gate_logits, routing, activation, gate_weights, gate_biases, gate_norms)
        arguments: Any = (inputs, weights, biases, *gates, norms, dropout, slopes, dice_eps)
        if needs_plain("expert_mixture", _torch.is_fx_symbolic_tracing() and arguments):
            return plain.expert_mixture(*arguments)
        checked = check_arguments(*arguments)
        if _decisions.wanted():
            x = checked.streams[0]
            reason = why_checked("level", x) if found is OBSERVED else found
            _decisions.note("expert_mixture", "checks in Python and PyTorch's dispatcher", reason, x, x.shape[0])
        found = evaluate(checked, routing)
    outputs: tuple[Tensor, ...] = found
    if torch.is_grad_enabled() and not _torch.compiling() and _torch.saves_through_hooks():
        checkpointed.note(outputs)
    return outputs
