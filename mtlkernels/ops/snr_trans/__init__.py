"""SNR-Trans: sub-networks joined by routes that transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtlkernels import _backends, _tracing
from mtlkernels.ops._call import (
    apply,
    distinct,
    needs_function,
    needs_plain,
    run_forward,
    traced_under_func,
    under_autocast,
)
from mtlkernels.ops._checks import Tensors
from mtlkernels.ops._snr import (
    Plan,
    Routes,
    as_exported,
    check_closed_grad,
    check_inputs,
    check_z,
    direct,
    plain,
    register,
    traced,
)
from mtlkernels.ops.snr_trans import reference, schema  # noqa: F401  (it defines the operators)
from mtlkernels.ops.snr_trans.checks import check_weight

register("snr_trans", reference)


def snr_trans(
    u: Tensor | Tensors,
    weight: Tensor | Sequence[Tensors],
    z: Tensor,
    *,
    closed_grad: bool = True,
) -> tuple[Tensor, ...]:
    """What I sub-networks read of the J below, each over a route with a matrix: ``v_i = sum_j z_ij W_ij u_j``.

    SNR-Trans (Ma et al., AAAI 2019, equation 3). A route with ``z_ij = 0`` is closed: it takes no part, also where
    ``u_j`` or ``W_ij`` are not finite, and costs neither arithmetic nor memory traffic. z is applied to float32 sums
    (float64 for float64); neither a scaled weight nor a route's product is stored. Differentiable in all three.

    The gradient of a closed route's weight is zero and not computed. That of its z, ``<dv_i, W_ij u_j>``, is not zero:
    it costs a product that is not kept, unless ``closed_grad`` is False.

    Args:
        u: J tensors [B, D_in], or one [J, B, D_in]; float32, bfloat16, float16 or float64; any strides. The D_in may
            differ where ``weight`` is a sequence.
        weight: [I, J, D_out, D_in], or a sequence (I) of sequences (J) of matrices [D_out_i, D_in_j].
        z: [I, J]; any of the four dtypes, float64 only with float64 ``u``. Autocast leaves it alone.
        closed_grad: False takes the gradient of a closed route's z as zero. That changes nothing where z is what
            :func:`mtlkernels.hard_concrete` returns, whose own gradient is zero there, and closed routes then cost
            nothing in the backward pass either.

    Returns:
        I tensors [B, D_out] of the dtype of ``u``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes, devices or the numbers of sub-networks do not agree.
    """
    check_closed_grad(closed_grad)
    found = direct("snr_trans", u, weight, z, closed_grad)
    if found is not None:
        return found
    if needs_plain("snr_trans", u, weight, z):
        inputs, weights, num_outputs = _tracing.quietly(_check, u, weight, z)
        return plain(closed_grad, inputs, reference.matrices(weights), z, num_outputs)
    inputs, weights, num_outputs = _check(u, weight, z)
    inputs, weights = under_autocast(inputs[0], inputs, weights)
    backend = _backends.forced()
    if traced_under_func("snr_trans"):
        return traced("snr_trans", closed_grad, inputs, weights, z)
    if needs_function(inputs, weights, (z,)):
        plan = Plan("snr_trans", len(inputs), len(weights), num_outputs, closed_grad, backend)
        return tuple(apply(Routes, plan, *distinct(*inputs, *weights, z)))
    return tuple(run_forward("snr_trans", backend, inputs[0], inputs, weights, as_exported(z, closed_grad)))


def _check(u: Any, weight: Any, z: Any) -> tuple[list[Tensor], list[Tensor], int]:
    """The inputs and weights as the operator takes them, and I."""
    inputs = check_inputs(u)
    weights, num_outputs = check_weight(weight, inputs)
    check_z(z, num_outputs, inputs)
    return inputs, weights, int(num_outputs)
