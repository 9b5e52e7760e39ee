"""SNR-Aver: sub-networks joined by routes that only scale."""

from __future__ import annotations

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
from mtlkernels.ops._checks import Tensors, shape_of
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
from mtlkernels.ops.snr_aver import reference, schema  # noqa: F401  (it defines the operators)

register("snr_aver", reference)


def snr_aver(u: Tensor | Tensors, z: Tensor, *, closed_grad: bool = True) -> tuple[Tensor, ...]:
    """What I sub-networks read of the J below: ``v_i = sum_j z_ij u_j``.

    SNR-Aver (Ma et al., AAAI 2019, equation 4). A route with ``z_ij = 0`` is closed: it takes no part, also where
    ``u_j`` is not finite, and costs neither arithmetic nor memory traffic. Sums are in float32 (float64 for float64).
    Differentiable in both.

    Args:
        u: J tensors [B, D], or one [J, B, D]; float32, bfloat16, float16 or float64; any strides.
        z: [I, J]; any of the four dtypes, float64 only with float64 ``u``. Autocast leaves it alone.
        closed_grad: False takes the gradient of a closed route's z as zero instead of computing ``<dv_i, u_j>``. That
            changes nothing where z is what :func:`mtlkernels.hard_concrete` returns, whose own gradient is zero there.

    Returns:
        I tensors [B, D] of the dtype of ``u``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes or devices do not agree.
    """
    check_closed_grad(closed_grad)
    found = direct("snr_aver", u, None, z, closed_grad)
    if found is not None:
        return found
    if needs_plain("snr_aver", u, z):
        inputs, num_outputs = _tracing.quietly(_check, u, z)
        return plain(closed_grad, inputs, None, z, num_outputs)
    inputs, num_outputs = _check(u, z)
    (inputs,) = under_autocast(inputs[0], inputs)
    backend = _backends.forced()
    if traced_under_func("snr_aver"):
        return traced("snr_aver", closed_grad, inputs, z)
    if needs_function(inputs, (z,)):
        plan = Plan("snr_aver", len(inputs), 0, num_outputs, closed_grad, backend)
        return tuple(apply(Routes, plan, *distinct(*inputs, z)))
    return tuple(run_forward("snr_aver", backend, inputs[0], inputs, as_exported(z, closed_grad)))


def _check(u: Any, z: Any) -> tuple[list[Tensor], int]:
    """The inputs as the operator takes them, and I."""
    inputs = check_inputs(u)
    for j, x in enumerate(inputs):
        if x.shape[1] != inputs[0].shape[1]:
            raise ValueError(f"u[{j}] must have the width of u[0], {inputs[0].shape[1]}, got {shape_of(x)}")
    check_z(z, None, inputs)
    return inputs, int(z.shape[0])
