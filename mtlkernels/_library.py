"""Every operator's schema and fake kernel, in one place.

Schemas are defined here, in Python, so that an install without a compiler has every operator; C++ only adds
implementations (``TORCH_LIBRARY_IMPL`` in ``csrc/cpu``). The reference is the default kernel of every operator, on
every device; CUDA C++ or Triton takes CUDA where it is installed.

The routing travels flat: ``expert_inputs`` as in :class:`mtlkernels.Routing`, ``gate_experts`` the experts of all
gates one after another, ``gate_sizes`` how many belong to each gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._layout import alike, saved_layers

_library = torch.library.Library("mtlkernels", "DEF")


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Casts the float16, bfloat16 and float32 tensors in ``value`` to ``dtype``, as autocast does; float64 stays."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, (list, tuple)):
        return [cast_floats(item, dtype) for item in value]
    return value


def _define(schema: str, fake: Callable[..., Any], autocast: Sequence[int] = ()) -> None:
    """Defines an operator, its fake kernel, and the positions of the arguments that autocast casts.

    Autocast never reaches into an implementation, also not where it casts nothing.
    """
    name = schema[: schema.index("(")]
    op, _, direction = name.rpartition("_")
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"mtlkernels::{name}", fake, lib=_library)

    def reference(*args: Any) -> Any:
        return _backends.reference_implementation(op, direction)(*args)

    _library.impl(name, reference, "CompositeExplicitAutograd")
    if _backends.has_triton() or _backends.has_cuda(op):

        def cuda(*args: Any) -> Any:
            return _backends.cuda_implementation(op, direction, args)(*args)

        _library.impl(name, cuda, "CUDA")
    for device in ("cpu", "cuda"):

        def cast(*args: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            ready = [cast_floats(arg, dtype) if i in autocast else arg for i, arg in enumerate(args)]
            with torch.autocast(device, enabled=False):
                return getattr(torch.ops.mtlkernels, name).default(*ready)

        _library.impl(name, cast, f"Autocast{device.upper()}")


def register_autograd(operator: str, differentiable: Callable[..., Any]) -> None:
    """Gives an operator a derivative: ``differentiable`` takes its arguments and returns what it returns.

    The public functions apply the op's autograd Function themselves; this serves direct calls of the operator, and
    torch.compile of torch.func.vmap, which traces past autograd Functions.
    """
    overload = getattr(torch.ops.mtlkernels, operator).default

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(_requires_grad(arg) for arg in args):
            return differentiable(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(operator, kernel, "Autograd", with_keyset=True)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) and item.requires_grad for item in value)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


# gated_mixture ------------------------------------------------------------------------------------------------------


def _gated_mixture_forward(
    experts: Tensor, gate_logits: list[Tensor], gate_experts: list[int], gate_sizes: list[int]
) -> list[Tensor]:
    rows, _, features = experts.shape
    return [_empty(experts, (rows, features)) for _ in gate_sizes]


def _gated_mixture_backward(
    grad_outputs: list[Tensor],
    experts: Tensor,
    gate_logits: list[Tensor],
    gate_experts: list[int],
    gate_sizes: list[int],
    need_experts: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    grad_experts = [_empty(experts, experts.shape)] if need_experts else []
    grad_logits = [_empty(logits, logits.shape) for logits in gate_logits] if need_logits else []
    return grad_experts, grad_logits


_define(
    "gated_mixture_forward(Tensor experts, Tensor[] gate_logits, int[] gate_experts, int[] gate_sizes) -> Tensor[]",
    _gated_mixture_forward,
    autocast=(0,),
)
_define(
    "gated_mixture_backward(Tensor[] grad_outputs, Tensor experts, Tensor[] gate_logits, int[] gate_experts,"
    " int[] gate_sizes, bool need_experts, bool need_logits) -> (Tensor[], Tensor[])",
    _gated_mixture_backward,
)


# expert_mixture -----------------------------------------------------------------------------------------------------
# Weights and biases are lists over layers, then experts: layer l of expert e stands at l * E + e. ``activations`` holds
# a code a layer, see mtlkernels.ops.activations. ``saved`` holds one [E, B, H] tensor a layer: the activation's output
# where its derivative follows from that, otherwise its input; it is empty unless ``save`` asks for it. Of several
# layers the last is not saved on CPUs: the backward pass computes it again, see ``saved_layers``.


def _expert_mixture_forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    gate_logits: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    save: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    rows, num_experts = inputs[0].shape[0], len(expert_inputs)
    widths = [weights[layer * num_experts].shape[0] for layer in range(len(activations))]
    outputs = [_empty(inputs[0], (rows, widths[-1])) for _ in gate_sizes]
    kept = widths[: saved_layers(len(widths), inputs[0].device)] if save else []
    saved = [_empty(inputs[0], (num_experts, rows, width)) for width in kept]
    return outputs, saved


def _expert_mixture_backward(
    grad_outputs: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    gate_logits: list[Tensor],
    saved: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    grad_inputs = [_empty(x, x.shape) for x in inputs] if need_inputs else []
    grad_weights = [_empty(w, w.shape) for w in weights] if need_weights else []
    grad_biases = [_empty(w, w.shape[:1]) for w in weights] if need_biases else []
    grad_logits = [_empty(logits, logits.shape) for logits in gate_logits] if need_logits else []
    return grad_inputs, grad_weights, grad_biases, grad_logits


_define(
    "expert_mixture_forward(Tensor[] inputs, Tensor[] weights, Tensor?[] biases, Tensor[] gate_logits,"
    " int[] expert_inputs, int[] gate_experts, int[] gate_sizes, int[] activations, bool save)"
    " -> (Tensor[], Tensor[])",
    _expert_mixture_forward,
    autocast=(0, 1, 2),
)
_define(
    "expert_mixture_backward(Tensor[] grad_outputs, Tensor[] inputs, Tensor[] weights, Tensor?[] biases,"
    " Tensor[] gate_logits, Tensor[] saved, int[] expert_inputs, int[] gate_experts, int[] gate_sizes,"
    " int[] activations, bool need_inputs, bool need_weights, bool need_biases, bool need_logits)"
    " -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _expert_mixture_backward,
)


# normalized_mixture -------------------------------------------------------------------------------------------------
# A level of experts whose layers have batch norm or layer norm, dropout, or activations with slopes. Lists as of
# expert_mixture, those of scales, shifts and slopes ([H] or [1]) too. A layer's ``norms``: 0 none, 1 batch norm by the
# batch's statistics, 2 layer norm; ``dice_eps`` is that of the activation "dice".
# ``saved`` holds one [E, B, H] tensor a layer: the pre-activation before the norm. ``means`` and ``variances`` (biased)
# have an entry for each layer with a norm: [E, H] of a batch norm, [E, B] of a layer norm, float32 or float64.
# ``seed``, one int64, decides what is dropped, see mtlkernels.ops._random.


def _normalized_mixture_forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    slopes: list[Tensor | None],
    gate_logits: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    norms: list[int],
    eps: list[float],
    dice_eps: list[float],
    dropout: list[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    outputs, _ = _expert_mixture_forward(inputs, weights, biases, gate_logits, *routing, False)
    rows, num_experts = inputs[0].shape[0], len(expert_inputs)
    widths = [weights[layer * num_experts].shape[0] for layer in range(len(activations))]
    saved = [_empty(inputs[0], (num_experts, rows, width)) for width in widths]
    sizes = [
        z.shape[:2] if norm == 2 else (z.shape[0], z.shape[2]) for z, norm in zip(saved, norms, strict=True) if norm
    ]
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    means, variances = ([torch.empty(size, dtype=dtype, device=inputs[0].device) for size in sizes] for _ in range(2))
    return outputs, saved, means, variances


def _normalized_mixture_backward(
    grad_outputs: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    slopes: list[Tensor | None],
    gate_logits: list[Tensor],
    saved: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    norms: list[int],
    eps: list[float],
    dice_eps: list[float],
    dropout: list[float],
    seed: Tensor | None,
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_norms: bool,
    need_slopes: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    needs = (need_inputs, need_weights, need_biases, need_logits)
    biases: list[Tensor | None] = [None] * len(weights)
    found = _expert_mixture_backward(grad_outputs, inputs, weights, biases, gate_logits, saved, *routing, *needs)
    grad_scales, grad_shifts, grad_slopes = (
        [_empty(part, part.shape) for part in parts if part is not None] if need else []
        for parts, need in ((scales, need_norms), (shifts, need_norms), (slopes, need_slopes))
    )
    return *found[:3], grad_scales, grad_shifts, grad_slopes, found[3]


_define(
    "normalized_mixture_forward(Tensor[] inputs, Tensor[] weights, Tensor?[] biases, Tensor?[] scales,"
    " Tensor?[] shifts, Tensor?[] slopes, Tensor[] gate_logits, int[] expert_inputs, int[] gate_experts,"
    " int[] gate_sizes, int[] activations, int[] norms, float[] eps, float[] dice_eps, float[] dropout, Tensor? seed)"
    " -> (Tensor[] outputs, Tensor[] saved, Tensor[] means, Tensor[] variances)",
    _normalized_mixture_forward,
    autocast=(0, 1, 2),
)
_define(
    "normalized_mixture_backward(Tensor[] grad_outputs, Tensor[] inputs, Tensor[] weights, Tensor?[] scales,"
    " Tensor?[] shifts, Tensor?[] slopes, Tensor[] gate_logits, Tensor[] saved, Tensor[] means, Tensor[] variances,"
    " int[] expert_inputs, int[] gate_experts, int[] gate_sizes, int[] activations, int[] norms, float[] eps,"
    " float[] dice_eps, float[] dropout, Tensor? seed, bool need_inputs, bool need_weights, bool need_biases,"
    " bool need_norms, bool need_slopes, bool need_logits) -> (Tensor[] grad_inputs, Tensor[] grad_weights,"
    " Tensor[] grad_biases, Tensor[] grad_scales, Tensor[] grad_shifts, Tensor[] grad_slopes, Tensor[] grad_logits)",
    _normalized_mixture_backward,
)


# pcgrad -------------------------------------------------------------------------------------------------------------
# ``grads`` holds T gradients a parameter: that of task t for parameter p stands at p * T + t, or is None. Each operator
# is one pass: the Gram matrix of the tasks' gradients, the projections on T x T coefficients, the weighted sum for each
# parameter.


def _pcgrad_gram(grads: list[Tensor | None], num_tasks: int) -> Tensor:
    like = next(grad for grad in grads if grad is not None)
    return torch.empty((num_tasks, num_tasks), dtype=torch.float64, device=like.device)


def _pcgrad_weights(
    gram: Tensor,
    order: Tensor | None,
    include_self: bool,
    max_norm: float | None,
    normalize: bool,
    project: bool,
    eps: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    return _empty(gram, gram.shape), _empty(gram, gram.shape[:1])


def _pcgrad_combine(grads: list[Tensor | None], num_tasks: int, coefficients: Tensor) -> list[Tensor]:
    columns = [grads[start : start + num_tasks] for start in range(0, len(grads), num_tasks)]
    return [torch.empty_like(alike([grad for grad in column if grad is not None])[0]) for column in columns]


_define("pcgrad_gram(Tensor?[] grads, int num_tasks) -> Tensor", _pcgrad_gram)
_define(
    "pcgrad_weights(Tensor gram, Tensor? order, bool include_self, float? max_norm, bool normalize, bool project,"
    " float eps, bool mean) -> (Tensor, Tensor)",
    _pcgrad_weights,
)
_define("pcgrad_combine(Tensor?[] grads, int num_tasks, Tensor coefficients) -> Tensor[]", _pcgrad_combine)


# snr_trans, snr_aver ------------------------------------------------------------------------------------------------
# ``weights`` holds one stacked tensor [I, J, D_out, D_in], or I * J matrices: that of the route from sub-network j to
# sub-network i stands at i * J + j. Without ``closed_grad`` the gradient of z is zero where z is.


def _snr_trans_forward(u: list[Tensor], weights: list[Tensor], z: Tensor) -> list[Tensor]:
    stacked = weights[0].dim() == 4
    widths = [weights[0].shape[2] if stacked else weights[i * len(u)].shape[0] for i in range(z.shape[0])]
    return [_empty(u[0], (u[0].shape[0], width)) for width in widths]


def _snr_trans_backward(
    grad_outputs: list[Tensor],
    u: list[Tensor],
    weights: list[Tensor],
    z: Tensor,
    need_u: bool,
    need_weights: bool,
    need_z: bool,
    closed_grad: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grad_u = [_empty(x, x.shape) for x in u] if need_u else []
    grad_weights = [_empty(w, w.shape) for w in weights] if need_weights else []
    return grad_u, grad_weights, [_empty(z, z.shape)] if need_z else []


def _snr_aver_forward(u: list[Tensor], z: Tensor) -> list[Tensor]:
    return [_empty(u[0], u[0].shape) for _ in range(z.shape[0])]


def _snr_aver_backward(
    grad_outputs: list[Tensor], u: list[Tensor], z: Tensor, need_u: bool, need_z: bool, closed_grad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    return [_empty(x, x.shape) for x in u] if need_u else [], [_empty(z, z.shape)] if need_z else []


_define("snr_trans_forward(Tensor[] u, Tensor[] weights, Tensor z) -> Tensor[]", _snr_trans_forward, autocast=(0, 1))
_define(
    "snr_trans_backward(Tensor[] grad_outputs, Tensor[] u, Tensor[] weights, Tensor z, bool need_u, bool need_weights,"
    " bool need_z, bool closed_grad) -> (Tensor[], Tensor[], Tensor[])",
    _snr_trans_backward,
)
_define("snr_aver_forward(Tensor[] u, Tensor z) -> Tensor[]", _snr_aver_forward, autocast=(0,))
_define(
    "snr_aver_backward(Tensor[] grad_outputs, Tensor[] u, Tensor z, bool need_u, bool need_z, bool closed_grad)"
    " -> (Tensor[], Tensor[])",
    _snr_aver_backward,
)
