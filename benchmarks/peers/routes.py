"""The routes between two levels of SNR, as they are usually written; all with the same signature.

``u`` are J tensors [B, D], ``weight`` is [I, J, D_out, D] (None for Aver) and z [I, J]; the result is I tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import mtlkernels as mk

Routes = Callable[[Sequence[Tensor], Tensor | None, Tensor], tuple[Tensor, ...]]


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


def along(u: Sequence[Tensor], weight: Tensor | None, z: Tensor, routes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """z folded into the weights, for ``routes`` alone: of each output the inputs that reach it, at least one.

    Products are added up in place, so that neither inputs nor weights are gathered anew. Parameters are taken apart
    once, since backwards a piece that was indexed is a tensor of the size of all.
    """
    scales = [row.unbind(0) for row in z.unbind(0)]
    weights = None if weight is None else [row.unbind(0) for row in weight.unbind(0)]
    outputs = []
    for i, (first, *others) in enumerate(routes):
        if weights is None:
            total = u[first] * scales[i][first]
            for j in others:
                total.addcmul_(u[j], scales[i][j])
        else:
            total = u[first] @ (scales[i][first] * weights[i][first]).t()
            for j in others:
                total.addmm_(u[j], (scales[i][j] * weights[i][j]).t())
        outputs.append(total)
    return tuple(outputs)


def of_open(evaluate: Callable[..., tuple[Tensor, ...]]) -> Routes:
    """:func:`along`, compiled or not; routes are read off z at each call, as any step of training may close some."""

    def routes(u: Sequence[Tensor], weight: Tensor | None, z: Tensor) -> tuple[Tensor, ...]:
        found = tuple(tuple(j for j, value in enumerate(row) if value != 0) for row in z.tolist())
        return evaluate(u, weight, z, found)

    return routes


def fused(u: Sequence[Tensor], weight: Tensor | None, z: Tensor) -> tuple[Tensor, ...]:
    """By mtlkernels; z comes out of a clamp, so that a closed route's needs no gradient."""
    if weight is None:
        return mk.snr_aver(u, z, closed_grad=False)
    return mk.snr_trans(u, weight, z, closed_grad=False)
