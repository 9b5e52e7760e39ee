"""Tensors that no op takes, in each place where a tensor stands: a TypeError or ValueError that names the argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops.level import gate_layers

ROUTING = mk.Routing.cgc(2, 1, 1)
MAKE = CaseFactory(0, torch.float32)


def pcgrad(grads: Any) -> Any:
    return mk.pcgrad(grads)


def compressed(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that the layout is in beta
        return tensor.to_sparse_csr() if tensor.dim() > 1 else tensor.to_sparse()


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int64),
    "truth values": lambda t: t.to(torch.bool),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "compressed": compressed,
    "another dtype": lambda t: t.double(),
    "another device": lambda t: t.to("meta"),
    "a list of numbers": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
}
CALLS: dict[str, tuple[Callable[..., Any], Case]] = {
    "expert_mixture": (mk.expert_mixture, MAKE.expert_mixture(6, [4, 8, 3], ROUTING)),
    "gate layers": (gate_layers.by_layers, gate_layers.with_layers(MAKE, 6, [4, 8, 3])),
    "gated_mixture": (mk.gated_mixture, MAKE.gated_mixture(6, 7, ROUTING)),
    "joined logits": (mk.gated_mixture, MAKE.gated_mixture(6, 7, ROUTING, joined_logits=True)),
    "snr_trans": (mk.snr_trans, snr_trans(MAKE, 6, [4, 3], [5, 2])),
    "stacked snr_trans": (mk.snr_trans, snr_trans(MAKE, 6, [4, 4], [5, 5], stacked=True, stacked_inputs=True)),
    "snr_aver": (mk.snr_aver, snr_aver(MAKE, 6, 5, 3, 2)),
    "pcgrad": (pcgrad, Case({"grads": [[MAKE.leaf(4, 3), MAKE.leaf(2, 2)] for _ in range(3)]}, torch.float32)),
}
# These are no mistakes: logits may be narrower than experts, and PCGrad takes sparse gradients.
TAKEN = {("gated_mixture", "another dtype"), ("joined logits", "another dtype"), ("pcgrad", "sparse")}


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where tensors stand in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield at
    elif isinstance(value, (list, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*at, key))


def replaced(value: Any, path: tuple[Any, ...], change: Callable[[Tensor], Any]) -> Any:
    """A copy in which the tensor at ``path`` is another."""
    if not path:
        return change(value)
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], change)
    return copy


# Of two tensors that do not go together either is named.
BESIDE_OTHERS = {"another dtype", "another device"}


@pytest.mark.parametrize("wanted", [True, False], ids=["training", "serving"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_in_each_place(name: str, kind: str, wanted: bool) -> None:
    op, case = CALLS[name]
    arguments = dict(case.map(lambda t: t.detach().requires_grad_(wanted)).arguments)
    for path in paths(arguments):
        if (name, kind) in TAKEN and path[0] in ("experts", "grads"):
            continue
        mistaken = replaced(arguments, path, lambda t: KINDS[kind](t.detach()))
        named = "|".join(arguments) if kind in BESIDE_OTHERS else path[0]
        message = rf"^({named})(\[\d+\])* must .*, got "
        with torch.set_grad_enabled(wanted), pytest.raises((TypeError, ValueError), match=message):
            op(**mistaken)
