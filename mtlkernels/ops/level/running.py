"""Batch norms by running statistics: what C++ takes of them when it serves, and those of gates."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtlkernels.ops._checks import as_sequence
from mtlkernels.ops._folding import fold, uses_running
from mtlkernels.ops.normalized_mixture.norms import check_module

GateLayers = tuple[list[Tensor], list[Tensor | None]]


def running_norms(norms: Any) -> Any:
    """For each layer and expert what :func:`_parts` gives, from ``norms`` of :func:`mtlkernels.expert_mixture`.

    Raises:
        ValueError, AttributeError, KeyError: some are not batch norms by running statistics.
    """
    if norms is None:
        return None
    return [None if layer is None else [_parts(norm) for norm in layer] for layer in norms]


def running_gates(norms: Any) -> Any:
    """The same for the gates' norms, of which any may be None."""
    return None if norms is None else [None if norm is None else _parts(norm) for norm in norms]


def _parts(norm: Any) -> tuple[Any, ...]:
    """Mean, variance, weight, bias and eps, past ``nn.Module.__getattr__``, which takes longer than all of this."""
    if not uses_running(norm):
        raise ValueError("not a batch norm by running statistics")
    own, buffers = norm._parameters, norm._buffers
    return buffers["running_mean"], buffers["running_var"], own["weight"], own["bias"], norm.eps


def check_gate_norms(norms: Any, gates: GateLayers | None, x: Tensor) -> list[Any]:
    """An entry a gate, a module or None; empty where no gate has a norm."""
    if norms is None:
        return []
    if gates is None:
        raise ValueError("gate_norms must be None without gate_weights, got norms")
    modules = list(as_sequence("gate_norms", norms, "None or a sequence with an entry a gate"))
    if len(modules) != len(gates[0]):
        raise ValueError(f"gate_norms must hold an entry for each of {len(gates[0])} gates, got {len(modules)}")
    for k, (module, weight) in enumerate(zip(modules, gates[0], strict=True)):
        if module is None:
            continue
        if type(module) is not nn.BatchNorm1d:
            raise TypeError(f"gate_norms[{k}] must be a BatchNorm1d or None, got {type(module).__name__}")
        check_module(f"gate_norms[{k}]", module, len(weight), x)
        if not uses_running(module):
            raise ValueError(f"gate_norms[{k}] must use its running statistics; with a batch's, pass gate_logits")
    return modules


def fold_gate_norms(norms: Any, gates: GateLayers | None, x: Tensor) -> GateLayers | None:
    """The gates' linear layers with their batch norms in them, differentiably; as they are without norms."""
    modules = check_gate_norms(norms, gates, x)
    if gates is None or not modules:
        return gates
    pairs = [
        (weight, bias) if module is None else tuple(part[0] for part in fold([weight], [bias], [module]))
        for weight, bias, module in zip(*gates, modules, strict=True)
    ]
    return [weight for weight, _ in pairs], [bias for _, bias in pairs]
