"""Checks of what the wrappers of optimizers take. Messages name the argument, what was expected and what was found."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlkernels._torch import is_flat_parameter
from mtlkernels.ops._checks import DTYPES, check_dense, shape_of


def check_optimizers(optimizer: Any, beside: Any) -> list[Optimizer]:
    """The optimizer to wrap, then the others whose parameters take part."""
    if isinstance(beside, Optimizer) or not isinstance(beside, Sequence):
        raise TypeError(f"beside must be a sequence of optimizers, got {type(beside).__name__}")
    for i, candidate in enumerate((optimizer, *beside)):
        name = f"beside[{i - 1}]" if i else "optimizer"
        if not isinstance(candidate, Optimizer):
            raise TypeError(f"{name} must be a torch.optim.Optimizer, got {type(candidate).__name__}")
        if any(is_flat_parameter(parameter) for parameter in parameters_of([candidate])):
            raise ValueError(
                f"{name} must hold a model's own parameters, got some that FullyShardedDataParallel has put together:"
                " shard it by torch.distributed.fsdp.fully_shard"
            )
    return [optimizer, *beside]


def parameters_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """All parameters of the optimizers, as they are now: groups can be added."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return list({id(parameter): parameter for group in groups for parameter in group["params"]}.values())


def check_shared(shared: Any, optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """``shared`` as a list, each tensor once; a frozen one need not be the optimizer's."""
    if isinstance(shared, (Tensor, torch.nn.Module)) or not isinstance(shared, Iterable):
        raise TypeError(f"shared must be an iterable of parameters or None, got {type(shared).__name__}")
    known = {id(parameter) for parameter in parameters_of(optimizers)}
    by_id: dict[int, Tensor] = {}
    for i, parameter in enumerate(shared):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"shared[{i}] must be a parameter, got {type(parameter).__name__}")
        if id(parameter) not in known and parameter.requires_grad:
            raise ValueError(
                f"shared[{i}] must be a parameter of the optimizer, got another of {shape_of(parameter)}: add it there,"
                " or give its own optimizer as beside"
            )
        by_id[id(parameter)] = parameter
    if not by_id:
        raise ValueError("shared must hold at least one parameter, got none: is it a generator that was used before?")
    return list(by_id.values())


def check_losses(losses: Any) -> list[Tensor]:
    """The losses, one a task; a vector of them is taken apart."""
    if isinstance(losses, Tensor):
        check_dense("losses", losses)
        if losses.dim() != 1:
            raise ValueError(f"losses must be a sequence of scalars or a vector [T], got shape {shape_of(losses)}")
        if not losses.requires_grad:
            raise ValueError("losses must require gradients, got a tensor that does not: is no_grad on?")
        losses = losses.unbind()
    if isinstance(losses, (str, bytes)) or not isinstance(losses, Sequence):
        raise TypeError(f"losses must be a sequence of tensors, one a task, got {type(losses).__name__}")
    if not losses:
        raise ValueError("losses must hold the loss of at least one task, got none")
    for i, loss in enumerate(losses):
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{i}] must be a tensor, got {type(loss).__name__}")
        check_dense(f"losses[{i}]", loss)
        if loss.numel() != 1:
            raise ValueError(f"losses[{i}] must be a scalar, got shape {shape_of(loss)}: take its mean() or sum()")
        if not loss.requires_grad:
            raise ValueError(f"losses[{i}] must require gradients, got one that does not: is no_grad on?")
        if loss.dtype not in DTYPES:
            raise TypeError(f"losses[{i}] must be float32, bfloat16, float16 or float64, got {loss.dtype}")
    return list(losses)


def check_trained(shared: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """There is something to train, and the tasks' gradients of what they share can be put into one Gram matrix."""
    if not shared and not others:
        raise ValueError("optimizer must hold a parameter that requires gradients, got none: are all frozen?")
    for i, parameter in enumerate(shared):
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"shared parameter {i} must be float32, bfloat16, float16 or float64, got {parameter.dtype}"
            )
        if parameter.device != shared[0].device:
            raise ValueError(
                f"shared parameter {i} must be on {shared[0].device} as the first one is, got {parameter.device}"
            )


def check_gram_every(gram_every: Any) -> int:
    """Of how many calls one is exact."""
    if isinstance(gram_every, bool) or not isinstance(gram_every, int):
        raise TypeError(f"gram_every must be an int, got {type(gram_every).__name__}")
    if gram_every < 1:
        raise ValueError(f"gram_every must be at least 1, got {gram_every}")
    return gram_every


def check_weighting(weighting: Any) -> None:
    """A function from a Gram matrix to weights; what may be taken for one by mistake is told what it is."""
    expected = "weighting must be a function from a Gram matrix [T, T] to weights [T]"
    if isinstance(weighting, type):
        raise TypeError(f"{expected}, got the class {weighting.__name__}: make an instance of it")
    if not callable(weighting):
        raise TypeError(f"{expected}, got {type(weighting).__name__}")
    # If nothing has imported TorchJD there are none. Each takes a Jacobian, and would take the matrix for one.
    aggregator = getattr(sys.modules.get("torchjd.aggregation"), "Aggregator", None)
    if aggregator is not None and isinstance(weighting, aggregator):
        name = type(weighting).__name__
        instead = f": give {name}Weighting" if hasattr(weighting, "gramian_weighting") else ""
        raise TypeError(f"{expected}, got TorchJD's aggregator {name}, which takes a Jacobian{instead}")


def check_weights(weights: Any, gram: Tensor) -> Tensor:
    """What a weighting has returned, as a new tensor [T] of the dtype and on the device of the Gram matrix."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weighting must return a tensor of weights [T], got {type(weights).__name__}")
    if weights.is_nested:
        raise TypeError("weighting must return a dense tensor of real numbers, got a nested one")
    if weights.layout != torch.strided or weights.is_complex() or weights.dtype == torch.bool or weights.is_quantized:
        raise TypeError(f"weighting must return a dense tensor of real numbers, got {weights.dtype}, {weights.layout}")
    if weights.is_meta and not gram.is_meta:
        raise ValueError(f"weighting must return weights with values, as on {gram.device}, got some on meta")
    if weights.shape != gram.shape[:1]:
        raise ValueError(
            f"weighting must return a weight a task, of shape {shape_of(gram[0])}, got shape {shape_of(weights)}"
        )
    own = torch.empty_like(gram[0]).copy_(weights)
    if not bool(own.isfinite().all()):
        raise ValueError(
            f"weighting must return finite weights for a finite Gram matrix, got {own.tolist()} for {gram.tolist()}"
        )
    return own
