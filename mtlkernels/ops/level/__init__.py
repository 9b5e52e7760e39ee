"""Expert mixture: a level of experts, evaluated and mixed by every gate in one fused operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _backends, _torch
from mtlkernels.ops._autograd import apply
from mtlkernels.ops._call import (
    direct_to_cpp,
    distinct,
    needs_function,
    needs_plain,
    run_forward,
    serve,
    traced_under_func,
    under_autocast,
)
from mtlkernels.ops._checks import check_logits, numbers_by_layer
from mtlkernels.ops._linears import joint_linear
from mtlkernels.ops.activations import CODES, has_slopes
from mtlkernels.ops.expert_level import expert_level
from mtlkernels.ops.expert_mixture import plain
from mtlkernels.ops.expert_mixture.arguments import check_arguments
from mtlkernels.ops.expert_mixture.autograd import ExpertMixture, Plan
from mtlkernels.ops.expert_mixture.checks import check_gate_layers
from mtlkernels.ops.expert_mixture.running import fold_gate_norms, running_gates, running_norms
from mtlkernels.ops.normalized_mixture import normalized_mixture
from mtlkernels.ops.normalized_mixture.norms import fold_running
from mtlkernels.routing import Routing, Wiring

PerExpert = Tensor | Sequence[Tensor]


def expert_mixture(
    inputs: Tensor | Sequence[Tensor],
    weights: Sequence[PerExpert],
    biases: Sequence[PerExpert | None] | None,
    gate_logits: Tensor | Sequence[Tensor] | None,
    routing: Routing,
    *,
    activation: str | Sequence[str] = "relu",
    gate_weights: Tensor | Sequence[Tensor] | None = None,
    gate_biases: Tensor | Sequence[Tensor | None] | None = None,
    gate_norms: Sequence[nn.Module | None] | None = None,
    norms: Sequence[Sequence[nn.Module] | None] | None = None,
    dropout: float | Sequence[float] = 0.0,
    slopes: Sequence[PerExpert | None] | None = None,
    dice_eps: float | Sequence[float] = 1e-3,
) -> tuple[Tensor, ...]:
    """Evaluates every expert of a level and mixes them by every gate, without storing the experts' outputs.

    Each expert is an MLP, ``x <- activation(x W^T + b)`` a layer, the last one included; gate k returns
    ``y_k = sum_e softmax(logits_k)_e * expert_e`` over the experts that it sees. With ``Routing.mmoe`` this is a level
    of MMoE (Ma et al., KDD 2018), with ``Routing.cgc`` one of PLE (Tang et al., RecSys 2020). Differentiable in
    ``inputs``, ``weights``, ``biases`` and ``gate_logits``. An expert that no gate mixes is not evaluated, and its
    gradients are zero. The softmax and the sums are in float32 (float64 for float64 inputs).

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
    if isinstance(dropout, float) and not dropout:
        gate_layers = (gate_weights, gate_biases, gate_norms)
        outputs = _direct(
            inputs, weights, biases, gate_logits, routing, activation, gate_layers, norms, slopes, dice_eps
        )
        if outputs is not None:
            return outputs
    parts = (inputs, weights, biases, routing, activation, norms, dropout, slopes, dice_eps)
    if needs_plain("expert_mixture", inputs, weights, biases, gate_logits, gate_weights, gate_biases, slopes):
        return plain.expert_mixture(*parts, gate_logits, gate_weights, gate_biases, gate_norms)
    streams, layers, bias_list, codes, layer_norms, rates, slope_list, epsilons = check_arguments(*parts)
    x = streams[0]
    layer_norms = fold_running(layer_norms, layers, bias_list)
    active = any(rates) or any(part is not None for part in (*layer_norms, *slope_list))
    if norms is not None and not active:
        starts = range(0, len(bias_list), routing.num_experts)
        folded = [bias_list[at : at + routing.num_experts] for at in starts]
        offsets = [None if entry[0] is None else entry for entry in folded]
        options: dict[str, Any] = {"activation": activation, "gate_weights": gate_weights, "gate_biases": gate_biases}
        options["gate_norms"] = gate_norms
        return expert_mixture(inputs, layers, offsets, gate_logits, routing, **options)  # type: ignore[arg-type]
    gates = check_gate_layers(gate_logits, gate_weights, gate_biases, streams, routing)
    gates = fold_gate_norms(gate_norms, gates, x)
    whole = gates is not None and not active and not _transformed()
    if gates is not None and not whole:
        gate_logits = _gate_logits(streams, *gates)
    logits = [] if whole else check_logits(gate_logits, routing, x.shape[0], x)
    flat_weights = [w for layer in layers for w in layer]
    streams, flat_weights, bias_list, whole_gates = under_autocast(x, streams, flat_weights, bias_list, gates or ())

    wiring = routing.wiring
    unused: list[Tensor] = []
    if wiring.idle:
        flat_weights, idle_weights = _partition(flat_weights, routing)
        bias_list, idle_biases = _partition(bias_list, routing)
        slope_list, idle_slopes = _partition(slope_list, routing)
        unused = [t for t in idle_weights + idle_biases + idle_slopes if t is not None]
    expert_inputs = wiring.expert_inputs if len(streams) > 1 else (0,) * len(wiring.live)
    flat = (expert_inputs, wiring.gate_experts, wiring.gate_sizes, codes)
    if active:
        own = (layer_norms, slope_list, epsilons, rates)
        return normalized_mixture(streams, flat_weights, bias_list, logits, *own, wiring, flat, unused)
    backend = _backends.forced()
    if whole:
        return expert_level(streams, flat_weights, bias_list, whole_gates[0], whole_gates[1], flat, unused)
    if traced_under_func("expert_mixture"):
        backend = "reference"
    elif needs_function(streams, flat_weights, bias_list, logits, unused):
        plan = Plan(*flat, len(streams), backend)
        out = apply(ExpertMixture, plan, *distinct(*streams, *flat_weights, *bias_list, *logits, *unused))
        return tuple(out[: len(logits)])
    out = run_forward("expert_mixture", backend, streams[0], streams, flat_weights, bias_list, logits, *flat, False)
    return tuple(out[0])


def _transformed() -> bool:
    """Whether a transform of torch.func or the compiler is at work, which see further into a level in its parts."""
    return torch.compiler.is_compiling() or _torch.func_transforms_active()


def _direct(
    inputs: Any,
    weights: Any,
    biases: Any,
    gate_logits: Any,
    routing: Any,
    activation: Any,
    gates: Any,
    norms: Any,
    slopes: Any,
    dice_eps: Any,
) -> tuple[Tensor, ...] | None:
    """A call on a CPU, where the way through checks and dispatcher would take as long as a small batch.

    Goes straight to the C++ operator, which checks what it is given before it computes. Returns None where this does
    not apply, and where the operator refuses: the checks in Python then find out why, in the caller's terms.
    """
    several = isinstance(inputs, (list, tuple))
    if not direct_to_cpp(inputs[0] if several and inputs else inputs):
        return None
    try:
        wiring = routing.wiring
        if wiring.idle or (several and len(inputs) != routing.num_inputs):
            return None
        if gates[0] is None if gate_logits is None else gates != (None, None, None):
            return None
        names = (activation,) * len(weights) if isinstance(activation, str) else activation
        codes = tuple([CODES[name] for name in names])
        sloped = [False] * len(codes) if slopes is None else [entry is not None for entry in slopes]
        if [has_slopes(code) for code in codes] != sloped:
            return None
        if torch.is_grad_enabled():
            if norms is not None or slopes is not None or gates[2] is not None:
                return None
            return _train(inputs, weights, biases, gate_logits, gates, wiring, codes)
        flat = (wiring.expert_inputs, wiring.gate_experts, wiring.gate_sizes, codes)
        epsilons = None if slopes is None else numbers_by_layer("dice_eps", "number", dice_eps, len(codes))
        extras = (running_norms(norms), running_gates(gates[2]), slopes, epsilons)
        args = (inputs, weights, biases, gate_logits, *gates[:2], *flat, *extras)
        served: tuple[Tensor, ...] = serve("expert_mixture", *args)
        return served
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _train(
    inputs: Any, weights: Any, biases: Any, logits: Any, gates: Any, wiring: Wiring, codes: tuple[int, ...]
) -> tuple[Tensor, ...] | None:
    """The direct way with gradients; None where none is wanted."""
    streams = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    experts = len(wiring.live)
    if any(len(layer) != experts for layer in (*weights, *(layer for layer in biases or () if layer is not None))):
        return None
    flat_weights = [w for layer in weights for w in layer]
    flat_biases: list[Any] = [None] * len(flat_weights)
    if biases is not None:
        flat_biases = [b for layer in biases for b in ([None] * experts if layer is None else layer)]
        if any(b is None for layer in biases if layer is not None for b in layer):
            return None
    flat = (wiring.expert_inputs if len(streams) > 1 else (0,) * experts, wiring.gate_experts, wiring.gate_sizes, codes)
    if logits is None:
        gate_weights = _per_gate(gates[0], wiring.gate_sizes)
        gate_biases = [None] * len(gate_weights) if gates[1] is None else _per_gate(gates[1], wiring.gate_sizes)
        if tuple(map(len, gate_weights)) != wiring.gate_sizes or len(gate_biases) != len(gate_weights):
            return None
        if 1 < len(streams) < len(gate_weights):
            return None
        if not needs_function(streams, flat_weights, flat_biases, gate_weights, gate_biases):
            return None
        return expert_level(streams, flat_weights, flat_biases, gate_weights, gate_biases, flat, (), direct=True)
    if isinstance(logits, Tensor):
        logits = logits.split(wiring.gate_sizes, dim=1)
    if not needs_function(streams, flat_weights, flat_biases, logits):
        return None
    plan = Plan(*flat, len(streams), _backends.forced(), direct=True)
    out = apply(ExpertMixture, plan, *streams, *flat_weights, *flat_biases, *logits)
    return tuple(out[: len(logits)])


def _per_gate(value: Any, sizes: Sequence[int]) -> list[Any]:
    """An entry a gate, from a list or from one tensor in which the gates' rows follow each other."""
    return list(value.split(sizes) if isinstance(value, Tensor) else value)


def _gate_logits(streams: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The logits of gates that are linear layers: one product where they read one stream."""
    if len(streams) == 1 and all((bias is None) == (biases[0] is None) for bias in biases):
        return joint_linear(streams[0], weights, [bias for bias in biases if bias is not None])
    rows = streams if len(streams) > 1 else [streams[0]] * len(weights)
    return [F.linear(x, weight, bias) for x, weight, bias in zip(rows, weights, biases, strict=False)]


def _partition(tensors: list[Any], routing: Routing) -> tuple[list[Any], list[Any]]:
    """A list over layers, then experts, divided into the experts that some gate mixes and the others."""
    layers = range(0, len(tensors), routing.num_experts)
    live = [tensors[at + e] for at in layers for e in routing.wiring.live]
    idle = [tensors[at + e] for at in layers for e in routing.wiring.idle]
    return live, idle
