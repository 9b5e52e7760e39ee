"""The norm modules and dropout rates of expert layers: checks, and the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels.ops._checks import Like, as_sequence, check_parameter, check_tensor, numbers_by_layer, shape_of
from mtlkernels.ops._folding import fold, scale_and_shift, uses_running
from mtlkernels.ops._operands import check_memory
from mtlkernels.ops.level.spec import BATCH_NORM, LAYER_NORM
from mtlkernels.routing import Routing

CODES: dict[type, int] = {nn.BatchNorm1d: BATCH_NORM, nn.LayerNorm: LAYER_NORM}


@dataclass(frozen=True)
class Norm:
    """The norms of a layer, one module an expert, all of one kind and ``eps``.

    ``running``: batch norms that use their running statistics, so that they are part of the linear layer.
    """

    code: int
    eps: float
    running: bool
    modules: tuple[Any, ...]


def check_norms(norms: Any, layers: Sequence[Sequence[Tensor]], routing: Routing, like: Like) -> list[Norm | None]:
    """For each layer its norms or None."""
    if norms is None:
        return [None] * len(layers)
    entries = _entries("norms", norms, "None or a sequence with an entry a layer")
    if len(entries) != len(layers):
        raise ValueError(f"norms must hold an entry for each of {len(layers)} layers, got {len(entries)}")
    checked = [
        None if entry is None else _check_layer(f"norms[{i}]", entry, layer[0].shape[0], routing, like)
        for i, (entry, layer) in enumerate(zip(entries, layers, strict=True))
    ]
    batch = [m for norm in checked if norm is not None and norm.code == BATCH_NORM for m in norm.modules]
    if len(set(batch)) != len(batch):  # by hash: the compiler would guard each id, and compile again for each model
        raise ValueError("norms must hold each BatchNorm1d once, as it has one set of statistics, got one twice")
    return checked


def _entries(name: str, value: Any, what: str) -> list[Any]:
    return _torch.all_unproxied(list(value if isinstance(value, nn.ModuleList) else as_sequence(name, value, what)))


def _check_layer(name: str, entry: Any, width: int, routing: Routing, like: Like) -> Norm:
    experts = routing.num_experts
    modules = _entries(name, entry, f"None or a sequence of {experts} modules")
    if len(modules) != experts:
        raise ValueError(f"{name} must hold a module for each of {experts} experts, got {len(modules)}")
    for e, module in enumerate(modules):
        if type(module) not in CODES:
            raise TypeError(f"{name}[{e}] must be a BatchNorm1d or a LayerNorm, got {type(module).__name__}")
        if type(module) is not type(modules[0]):
            first = type(modules[0]).__name__
            raise TypeError(f"{name}[{e}] must be of the kind of {name}[0], {first}, got {type(module).__name__}")
        check_module(f"{name}[{e}]", module, width, like)
        if module.eps != modules[0].eps:
            raise ValueError(f"{name}[{e}] must have the eps of {name}[0], {modules[0].eps}, got {module.eps}")
        if uses_running(module) != uses_running(modules[0]):
            raise ValueError(
                f"{name} must all use the batch's statistics or all running ones, got both: train() or eval() all"
            )
    return Norm(CODES[type(modules[0])], float(modules[0].eps), uses_running(modules[0]), tuple(modules))


def check_module(name: str, module: Any, width: int, like: Like) -> None:
    """A norm of ``width`` features, whose parameters and running statistics go with the input."""
    shape = (module.num_features,) if type(module) is nn.BatchNorm1d else module.normalized_shape
    if tuple(shape) != (width,):
        raise ValueError(f"{name} must normalize the {width} features of its layer, got {list(shape)}")
    for part in ("weight", "bias"):
        tensor = getattr(module, part)
        if tensor is None:
            continue
        _check_vector(f"{name}.{part}", tensor, width, like)
    if isinstance(module.eps, bool) or not isinstance(module.eps, (int, float)):
        raise TypeError(f"{name}.eps must be a number, got {type(module.eps).__name__}")
    if type(module) is nn.BatchNorm1d:
        for part in ("running_mean", "running_var"):
            if part not in module._buffers:
                raise TypeError(f"{name}.{part} must be a buffer, got {type(getattr(module, part, None)).__name__}")
        if not module.eps >= 0:
            raise ValueError(f"{name}.eps must be at least 0, got {module.eps}")
        if module.track_running_stats or not module.training:
            _check_statistics(name, module, width, like)


def _check_statistics(name: str, module: Any, width: int, like: Like) -> None:
    """The running mean and variance of a batch norm that reads them or brings them up to date: both, or neither."""
    if module.running_mean is None and module.running_var is None:
        return
    writes = module.training and module.track_running_stats and not _torch.compiling()
    if writes:
        if not isinstance(module.momentum, (Real, Tensor, type(None))):
            raise TypeError(f"{name}.momentum must be a number or None, got {type(module.momentum).__name__}")
        if module.num_batches_tracked is not None:
            check_memory(f"{name}.num_batches_tracked", module.num_batches_tracked)
            _check_writable(f"{name}.num_batches_tracked", module.num_batches_tracked)
    for part in ("running_mean", "running_var"):
        tensor = getattr(module, part)
        _check_vector(f"{name}.{part}", tensor, width, like)
        if writes:
            _check_writable(f"{name}.{part}", tensor)


def _check_writable(name: str, tensor: Tensor) -> None:
    """Statistics or a count that a step of training changes."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} must be a tensor that training can write to, got one that torch.inference_mode made")


def _check_vector(name: str, tensor: Tensor, width: int, like: Like) -> None:
    """A parameter or statistics of a norm of ``width`` features, whose memory is there."""
    check_tensor(name, tensor, 1, f"[{width}]")
    if tensor.shape != (width,):
        raise ValueError(f"{name} must have shape [{width}], got {shape_of(tensor)}")
    check_parameter(name, tensor, "inputs", like)
    check_memory(name, tensor)


def check_dropout(dropout: Any, num_layers: int) -> tuple[float, ...]:
    """A rate a layer."""
    rates = numbers_by_layer("dropout", "rate", dropout, num_layers)
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {rate}")
    return tuple(rates)


def parameters(norms: Sequence[Norm | None], part: str, experts: Sequence[int]) -> list[Tensor | None]:
    """The norms' "weight" or "bias" of some experts, in one list over layers, then experts."""
    return [None if norm is None else getattr(norm.modules[e], part) for norm in norms for e in experts]


def fold_running(
    norms: Sequence[Norm | None], layers: list[list[Tensor]], biases: list[Tensor | None]
) -> list[Norm | None]:
    """Makes norms with running statistics a part of weights and biases, in place; returns the other norms."""
    for i, norm in enumerate(norms):
        if norm is None or not norm.running:
            continue
        part = slice(i * len(norm.modules), (i + 1) * len(norm.modules))
        layers[i], biases[part] = fold(layers[i], biases[part], norm.modules)
    return others(norms)


def scales_of_running(
    norms: Sequence[Norm | None], biases: list[Tensor | None], live: Sequence[int], gates: Any
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What ``level_serve`` takes of norms with running statistics, in the place of biases, which become None.

    Args:
        norms, biases: of the layers, and by layer, then expert.
        live: the experts that some gate mixes.
        gates: biases and norms of linear gates, whose norms may be none at all; None without such gates.
    """
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for i, norm in enumerate(norms):
        if norm is None or not norm.running:
            found.append((None, None))
            continue
        first = i * len(norm.modules)
        found.append(scale_and_shift([biases[first + e] for e in live], [norm.modules[e] for e in live]))
        biases[first : first + len(norm.modules)] = [None] * len(norm.modules)
    of_gates, modules = ([], []) if gates is None else gates
    for k, module in enumerate(modules or [None] * len(of_gates)):
        if module is None:
            found.append((None, None))
            continue
        scale, shift = scale_and_shift([of_gates[k]], [module])
        found.append((scale.squeeze(0), shift.squeeze(0)))
        of_gates[k] = None
    return [scale for scale, _ in found], [shift for _, shift in found]


def others(norms: Sequence[Norm | None]) -> list[Norm | None]:
    """The norms without those by running statistics."""
    return [None if norm is None or norm.running else norm for norm in norms]


def check_rows(norms: Sequence[Norm], rows: int) -> None:
    """As PyTorch's batch norm: the statistics of one row say nothing."""
    for norm in norms:
        if norm.code == BATCH_NORM and rows < 2:
            size = torch.Size([rows, norm.modules[0].num_features])
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def update_running_statistics(
    norms: Sequence[Norm], experts: Sequence[int], statistics: Sequence[Tensor], rows: int
) -> None:
    """What ``nn.BatchNorm1d`` does with the statistics of a batch in training.

    As there, autograd does not count it as a change of the running ones: an earlier pass in evaluation may be waiting
    for its backward pass.

    Args:
        norms: of the layers that have one, in order.
        experts: those of which there are statistics.
        statistics: the means, an entry a norm, [E, H] of a batch norm, and then the biased variances; running ones are
            unbiased.
        rows: B.
    """
    if _torch.compiling():  # a program of torch.export with gradients switched off in its middle cannot be loaded
        _updates(norms, experts, [value.detach() for value in statistics], rows).write()
        return
    with torch.no_grad():
        updates = _updates(norms, experts, statistics, rows)
        updates.check_batched(statistics)
        with _torch.uncounted_writes(updates.running()):
            updates.write()


class _Update(NamedTuple):
    """What a batch is about to do to a batch norm.

    Attributes:
        batches: how many there were, to be raised by one; None where it is not counted.
        momentum: None where running statistics are means of all batches.
        pairs: running statistics, and those of the batch.
    """

    batches: Tensor | None
    momentum: float | None
    pairs: list[tuple[Tensor, Tensor]]

    def write(self) -> None:
        """Brings it up to date, as PyTorch's module does it."""
        if self.batches is not None:
            self.batches.add_(1)
        for running, value in self.pairs:
            if self.momentum is not None:
                running.copy_(_average(running, value, float(self.momentum)))
            elif self.batches is not None:
                running.copy_(_average(running, value, 1 / self.batches.to(value.dtype)))


class _Updates(NamedTuple):
    """Those of all batch norms."""

    modules: list[_Update]

    def counts(self) -> list[Tensor]:
        return [module.batches for module in self.modules if module.batches is not None]

    def running(self) -> list[Tensor]:
        """All running statistics."""
        return [running for module in self.modules for running, _ in module.pairs]

    def check_batched(self, statistics: Sequence[Tensor]) -> None:
        """Refuses statistics of examples that torch.func.vmap batches for running ones that it does not."""
        if any(map(_torch.is_vmapped, statistics)) and not all(map(_torch.is_vmapped, self.running())):
            raise RuntimeError(
                "batch norm in training got a batch of examples from torch.func.vmap, of which each would write its "
                "statistics to the same running_mean and running_var: batch these buffers too "
                "(torch.func.stack_module_state), use evaluation mode, or track_running_stats=False"
            )

    def write(self) -> None:
        """Brings counts and running statistics up to date."""
        if not self._go_together():
            for module in self.modules:
                module.write()
            return
        if counts := self.counts():
            torch._foreach_add_(counts, 1)
        by_momentum: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for _, momentum, pairs in self.modules:
            by_momentum.setdefault(float(momentum or 0), []).extend(pairs)
        for weight, pairs in by_momentum.items():
            averages, values = map(list, zip(*pairs, strict=True))
            if all(average.dtype is value.dtype for average, value in pairs):
                torch._foreach_mul_(averages, 1 - weight)
                torch._foreach_add_(averages, values, alpha=weight)
            else:
                torch._foreach_copy_(averages, [_average(*pair, weight) for pair in pairs])

    def _go_together(self) -> bool:
        """Whether lists can be written to: under vmap there is no rule for that, and modules may share statistics."""
        tensors = [*self.counts(), *self.running()]
        return (
            not any(map(_torch.is_vmapped, tensors))
            and len(set(tensors)) == len(tensors)
            and all(module.momentum is not None for module in self.modules)
        )


def _average(running: Tensor, value: Tensor, weight: Any) -> Tensor:
    """As PyTorch's batch norm has it: what is infinite stays so, and what is narrow is rounded once, by the caller."""
    averaged: Tensor = running.to(value.dtype) * (1 - weight) + value * weight
    return averaged


def _updates(norms: Sequence[Norm], experts: Sequence[int], statistics: Sequence[Tensor], rows: int) -> _Updates:
    """Of the arguments of :func:`update_running_statistics`."""
    updates: list[_Update] = []
    for norm, mean, variance in zip(norms, statistics[: len(norms)], statistics[len(norms) :], strict=True):
        if norm.code != BATCH_NORM:
            continue
        unbiased = variance * (rows / (rows - 1))
        modules = [norm.modules[e] for e in experts]
        for module, *batch in zip(modules, mean.unbind(0), unbiased.unbind(0), strict=True):
            if not module.track_running_stats or module.running_mean is None:
                continue
            pairs = list(zip((module.running_mean, module.running_var), batch, strict=True))
            updates.append(_Update(module.num_batches_tracked, module.momentum, pairs))
    return _Updates(updates)


def running_parts(norm: Any) -> tuple[Any, ...] | None:
    """Mean, variance, weight, bias and eps of a batch norm by running statistics; None for any other norm.

    By :func:`uses_running`, but past ``nn.Module.__getattr__``, which takes longer than all of this; a norm whose
    parameters are made by a parametrization has them elsewhere.
    """
    if type(norm) is not nn.BatchNorm1d:
        return None
    own = norm.__dict__
    parameters, buffers = own["_parameters"], own["_buffers"]
    if own["training"] or "weight" not in parameters or "bias" not in parameters:
        return None
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or variance is None:
        return None
    return mean, variance, parameters["weight"], parameters["bias"], own["eps"]


def check_gate_norms(norms: Any, weights: Sequence[Tensor] | None, like: Like) -> list[Any]:
    """An entry a gate of these weights, a module or None; empty where no gate has a norm."""
    if norms is None:
        return []
    if weights is None:
        raise ValueError("gate_norms must be None without gate_weights, got norms")
    modules = _entries("gate_norms", norms, "None or a sequence with an entry a gate")
    if len(modules) != len(weights):
        raise ValueError(f"gate_norms must hold an entry for each of {len(weights)} gates, got {len(modules)}")
    for k, (module, weight) in enumerate(zip(modules, weights, strict=True)):
        if module is None:
            continue
        if type(module) is not nn.BatchNorm1d:
            raise TypeError(f"gate_norms[{k}] must be a BatchNorm1d or None, got {type(module).__name__}")
        check_module(f"gate_norms[{k}]", module, len(weight), like)
        if not uses_running(module):
            raise ValueError(
                f"gate_norms[{k}] must use its running statistics, got one that takes the batch's: call its eval(), or"
                " pass gate_logits"
            )
    return modules


def fold_gate_norms(
    weights: list[Tensor], biases: list[Tensor | None], modules: list[Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gates' linear layers with their batch norms in them, differentiably; as they are without norms."""
    for k, module in enumerate(modules):
        if module is not None:
            (weights[k],), (biases[k],) = fold([weights[k]], [biases[k]], [module])
    return weights, biases
