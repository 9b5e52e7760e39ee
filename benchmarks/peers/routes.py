"""The routes between two levels of SNR, as they are usually written; all with the same signature.

``u`` are J tensors [B, D], ``weight`` is [I, J, D_out, D] (None for Aver) and z [I, J]; the result is I tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import mtlkernels as mk


def loops(u: Sequence[Tensor], weight: Tensor | None, z: Tensor) -> tuple[Tensor, ...]:
    """A product a route, scaled and added up: the formula."""
    outputs = []
    for i in range(z.shape[0]):
        sent = u if weight is None else [x @ weight[i, j].t() for j, x in enumerate(u)]
        total = z[i, 0] * sent[0]
        for j in range(1, len(u)):
            total = total + z[i, j] * sent[j]
        outputs.append(total)
    return tuple(outputs)


def folded(u: Sequence[Tensor], weight: Tensor | None, z: Tensor) -> tuple[Tensor, ...]:
    """z folded into the weights, and one product an output with the sub-networks side by side; no route is skipped."""
    if weight is None:
        return tuple(torch.tensordot(z, torch.stack(list(u)), 1).unbind(0))
    together = torch.cat(list(u), 1)
    scaled = (z[:, :, None, None] * weight).transpose(1, 2).flatten(2)
    return tuple(together @ w.t() for w in scaled.unbind(0))


def fused(u: Sequence[Tensor], weight: Tensor | None, z: Tensor) -> tuple[Tensor, ...]:
    """By mtlkernels; z comes out of a clamp, so that a closed route's needs no gradient."""
    if weight is None:
        return mk.snr_aver(u, z, closed_grad=False)
    return mk.snr_trans(u, weight, z, closed_grad=False)
