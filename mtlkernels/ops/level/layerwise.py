"""The direct way of levels whose pre-activations are stored: with norms by the batch, dropout, or slopes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _backends, _extension
from mtlkernels.ops._folding import uses_running
from mtlkernels.ops.activations import DICE
from mtlkernels.ops.level.norms import CODES
from mtlkernels.ops.level.spec import Layer, LevelSpec

# Of norms, by layer, then expert.
LISTS_OF_MODULES = (list, tuple, nn.ModuleList)


class Stored(NamedTuple):
    """What is static about the layers, and the norms that normalize by the batch: a list for each layer, or None."""

    layers: tuple[Layer, ...]
    norms: list[Any] | None


def stored(layers: Sequence[Layer], norms: Any, rates: Sequence[float], epsilons: Any) -> Stored | str | None:
    """What is stored of a call; words, where something stands against that; None where nothing has to be.

    That is so of plain layers, of slopes and of norms by running statistics where no gradient is wanted, and of norms
    of which the checks in Python know what is wrong.

    Args:
        layers: by their activations.
        norms: as ``expert_mixture`` takes them.
        rates: of dropout, one a layer, or none where nothing is dropped.
        epsilons: of Dice, one a layer; None where no activation has slopes.
    """
    if norms is None and not rates and (epsilons is None or not torch.is_grad_enabled()):
        return None
    own = _by_batch(norms, len(layers))
    if own is None and norms is not None:
        return "running statistics beside dropout" if rates else None
    count = len(layers)
    none = (0.0,) * count
    found: list[Layer] = []
    for layer, modules, rate, eps in zip(layers, own or [None] * count, rates or none, epsilons or none, strict=True):
        code, norm_eps = (0, 0.0) if modules is None else (CODES[type(modules[0])], modules[0].eps)
        found.append(Layer(layer.activation, code, norm_eps, eps if layer.activation == DICE else 0.0, rate))
    return Stored(tuple(found), own)


def _by_batch(norms: Any, count: int) -> list[Any] | None:
    """Norms of which some layer's normalize by the batch, as lists; C++ looks at each module."""
    if not isinstance(norms, LISTS_OF_MODULES) or len(norms) != count:
        return None
    own: list[Any] = list(norms)
    present = [modules for modules in own if modules is not None]
    if not all(isinstance(modules, LISTS_OF_MODULES) and len(modules) for modules in present):
        return None
    firsts: list[Any] = [modules[0] for modules in present]
    plain = all(type(first) in CODES and type(first.eps) in (float, int) for first in firsts)
    if not plain or all(map(uses_running, firsts)):
        return None
    return [list(modules) if isinstance(modules, nn.ModuleList) else modules for modules in own]


def direct(
    spec: LevelSpec, inputs: Any, weights: Any, biases: Any, logits: Any, norms: list[Any] | None, slopes: Any
) -> tuple[Tensor, ...] | None:
    """The level's outputs; norms are then up to date. None where the call is not such as C++ takes."""
    if spec.unread:
        return None
    by_name = _backends.forced() is not None
    found: tuple[Tensor, ...] | None = _extension.function("layerwise_level")(
        inputs, weights, biases, logits, norms, slopes, *spec.encoded, by_name
    )
    return found
