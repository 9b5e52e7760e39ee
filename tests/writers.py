"""Ways in which parameters and buffers change, counted by PyTorch or not: what a served value must never outlive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

# Writes to one tensor in place, so that its values change.
WRITERS: dict[str, Callable[[Tensor], None]] = {}
# Changes to a module through PyTorch's interfaces; they are given a module with a floating-point parameter "weight".
CHANGES: dict[str, Callable[[Any], None]] = {}


def writer(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    WRITERS[function.__name__] = function
    return function


def change(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CHANGES[function.__name__] = function
    return function


def bits(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as NumPy's integers, which know every dtype."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(kind).numpy()


@writer
def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5)


@writer
def data_in_place(tensor: Tensor) -> None:
    tensor.data.mul_(1.5)


@writer
def one_row_of_data(tensor: Tensor) -> None:
    tensor.data[-1] = 3.0


@writer
def one_value_of_data(tensor: Tensor) -> None:
    tensor.data.view(-1)[7 % tensor.numel()] = 50.0


@writer
def new_data(tensor: Tensor) -> None:
    tensor.data = tensor.detach() * 1.5


@writer
def a_detached_view(tensor: Tensor) -> None:
    tensor.detach()[:2] = 2.0


@writer
def numpy_view(tensor: Tensor) -> None:
    bits(tensor)[...] = bits(torch.tensor(4.0, dtype=tensor.dtype))


@writer
def dlpack_view(tensor: Tensor) -> None:
    torch.from_dlpack(tensor.detach().__dlpack__()).mul_(1.5)


@writer
def buffer_protocol(tensor: Tensor) -> None:
    np.copyto(np.asarray(memoryview(bits(tensor))), bits(tensor.detach() * 1.5))


@writer
def storage_copy(tensor: Tensor) -> None:
    other = (tensor.detach() * 1.5).contiguous()
    tensor.untyped_storage().copy_(other.untyped_storage())


@writer
def another_thread(tensor: Tensor) -> None:
    thread = threading.Thread(target=lambda: tensor.data.mul_(1.5))
    thread.start()
    thread.join()


@writer
def inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(1.5)


@writer
def moving_average(tensor: Tensor) -> None:
    torch._foreach_lerp_([tensor.data], [torch.full_like(tensor, 2.0)], 0.5)


@writer
def set_to_another_storage(tensor: Tensor) -> None:
    other = tensor.detach() * 1.5
    with torch.no_grad():
        tensor.set_(other.untyped_storage(), 0, other.shape, other.stride())


@writer
def resized_and_filled(tensor: Tensor) -> None:
    shape = tensor.shape
    with torch.no_grad():
        tensor.requires_grad_(False).resize_(0).resize_(shape).fill_(0.7)


@change
def load_state_dict(module: Any) -> None:
    module.load_state_dict({key: _grown(value) for key, value in module.state_dict().items()})


@change
def load_state_dict_by_assignment(module: Any) -> None:
    module.load_state_dict({key: _grown(value) for key, value in module.state_dict().items()}, assign=True)


@change
def swap_tensors(module: Any) -> None:
    torch.utils.swap_tensors(module.weight, nn.Parameter(module.weight.detach() * 1.5))


@change
def masked_pruning(module: Any) -> None:
    prune.l1_unstructured(module, "weight", amount=0.6)
    prune.remove(module, "weight")


@change
def share_memory(module: Any) -> None:
    module.share_memory()
    module.weight.data.mul_(1.5)


def _grown(value: Tensor) -> Tensor:
    return value * 1.5 if value.is_floating_point() else value


def _optimizer(kind: Any, **options: Any) -> Callable[[Any], None]:
    def step(module: Any) -> None:
        parameters = list(module.parameters())
        optimizer = kind(parameters, lr=0.5, **options)
        for p in parameters:
            p.grad = torch.zeros_like(p)
            p.grad[-1] = -1.0  # a loss on one output, which grows
        optimizer.step()
        optimizer.zero_grad()

    return step


for _kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
    for _way in ("fused", "foreach", "plain"):
        _options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}[_way]
        CHANGES[f"{_kind.__name__}_{_way}"] = _optimizer(_kind, **_options)
