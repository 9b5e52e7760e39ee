"""Checks of arguments that several ops share. Messages name the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from mtlkernels import _tracing
from mtlkernels._backends import autocast_enabled
from mtlkernels.routing import Routing

# What :func:`as_sequence` takes, for annotations.
Tensors: TypeAlias = Sequence[Tensor] | torch.nn.ParameterList


class Like(NamedTuple):
    """What checks of other arguments have to know of a tensor [rows, width]."""

    dtype: torch.dtype
    device: torch.device
    rows: int
    width: int


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def check_tensor(name: str, value: Any, dim: int, shape: str) -> None:
    """``value`` is a floating-point tensor of ``dim`` dimensions, written ``shape`` in the message."""
    if not isinstance(value, Tensor):
        _tracing.refuse_proxies(name, value)
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    check_dense(name, value)
    if value.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {shape_of(value)}")


def check_dense(name: str, value: Tensor) -> None:
    """Before anybody asks for a shape, which a nested tensor does not have."""
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def _same_under_autocast(a: Tensor, b: Tensor | Like) -> bool:
    """Whether autocast is about to cast both tensors to one dtype, as it leaves activations and parameters apart."""
    return torch.float64 not in (a.dtype, b.dtype) and autocast_enabled(a.device.type)


def check_like(name: str, value: Tensor, like_name: str, like: Tensor | Like) -> None:
    """``value`` has the dtype, as far as autocast does not see to that, and the device of ``like``."""
    if value.dtype != like.dtype and not _same_under_autocast(value, like):
        raise TypeError(
            f"{name} must have the dtype of {like_name}, {like.dtype}, got {value.dtype}: cast one by .to(dtype)"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {value.device}: move one by .to(device)"
        )


def check_parameter(name: str, value: Tensor, like_name: str, like: Tensor | Like) -> None:
    """:func:`check_like`, or float32 beside lower precision, as PyTorch's norms take their parameters."""
    mixed = value.dtype == torch.float32 and like.dtype in (torch.bfloat16, torch.float16)
    if not (mixed and value.device == like.device):
        check_like(name, value, like_name, like)


def check_routing(routing: Any) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a mtlkernels.Routing, got {type(routing).__name__}")


def as_sequence(name: str, value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple, torch.nn.ParameterList)):
        _tracing.refuse_proxies(name, value)
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
    return list(value)


def numbers_by_layer(name: str, what: str, value: Any, num_layers: int) -> list[float]:
    """A number a layer, from one (a ``what``, in messages) or from a sequence."""
    one = isinstance(value, (int, float))
    numbers = [value] * num_layers if one else as_sequence(name, value, f"a {what} or a sequence of {what}s")
    if len(numbers) != num_layers:
        raise ValueError(f"{name} must be one {what} or one for each of {num_layers} layers, got {len(numbers)}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must hold numbers, got {type(number).__name__}")
    return [float(number) for number in numbers]


def check_logits(gate_logits: Any, routing: Routing, rows: int, like: Tensor | Like) -> list[Tensor]:
    """The K tensors [B, N_k] of gate logits, from a sequence of them or from one tensor [B, sum N_k].

    The number of rows is put into a message only when there is one: torch.compile would take it for a constant.
    """
    sizes = [len(gate) for gate in routing.gate_experts]
    if isinstance(gate_logits, Tensor):
        check_tensor("gate_logits", gate_logits, 2, f"[B, {sum(sizes)}]")
        if gate_logits.shape[1] != sum(sizes):
            raise ValueError(
                f"gate_logits must have shape [{rows}, {sum(sizes)}], a column for each expert of each gate,"
                f" got {shape_of(gate_logits)}"
            )
        logits, names = list(gate_logits.split(sizes, dim=1)), ["gate_logits"] * len(sizes)
    else:
        logits = list(as_sequence("gate_logits", gate_logits, "a tensor or a sequence of tensors"))
        if len(logits) != len(sizes):
            raise ValueError(f"gate_logits must hold a tensor for each of {len(sizes)} gates, got {len(logits)}")
        names = [f"gate_logits[{k}]" for k in range(len(sizes))]
    for name, tensor, size in zip(names, logits, sizes, strict=True):
        check_tensor(name, tensor, 2, f"[B, {size}]")
        if tensor.shape[0] != rows or tensor.shape[1] != size:
            raise ValueError(f"{name} must have shape [{rows}, {size}], got {shape_of(tensor)}")
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on device {like.device}, got {tensor.device}")
        if tensor.dtype != logits[0].dtype:
            raise TypeError(f"{name} must have the dtype of the first gate, {logits[0].dtype}, got {tensor.dtype}")
        if tensor.dtype == torch.float64 and like.dtype != torch.float64:
            raise TypeError(f"{name} must be float32 or narrower beside experts in {like.dtype}, got {tensor.dtype}")
    return logits


def refuse_training() -> NoReturn:
    """For a level, or a model, that :func:`mtlkernels.prepare` has made."""
    raise RuntimeError(
        "a copy that mtlkernels.prepare has made serves only, got a call in training mode: call eval(), or train the"
        " model that it was made of"
    )
