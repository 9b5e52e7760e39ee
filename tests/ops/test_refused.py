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


def joined_gates() -> Case:
    """Gates whose layers follow each other in one tensor."""
    case = gate_layers.with_layers(MAKE, 6, [4, 8, 3], streams=False)
    rows = sum(len(gate) for gate in gate_layers.ROUTING.gate_experts)
    return Case({**case.arguments, "gate_weights": MAKE.leaf(rows, 4), "gate_biases": MAKE.leaf(rows)}, case.dtype)


def compressed(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that the layout is in beta
        return tensor.to_sparse_csr() if tensor.dim() > 1 else tensor.to_sparse()


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that they are a prototype
        return torch.nested.nested_tensor([tensor] if tensor.dim() < 2 else list(tensor.unbind(0)))


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int64),
    "truth values": lambda t: t.to(torch.bool),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "nested": nested,
    "compressed": compressed,
    "another dtype": lambda t: t.double(),
    "another device": lambda t: t.to("meta"),
    "a list of numbers": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
}
CALLS: dict[str, tuple[Callable[..., Any], Case]] = {
    "expert_mixture": (mk.expert_mixture, MAKE.expert_mixture(6, [4, 8, 3], ROUTING)),
    "gate layers": (gate_layers.by_layers, gate_layers.with_layers(MAKE, 6, [4, 8, 3])),
    "joined gate layers": (gate_layers.by_layers, joined_gates()),
    "gated_mixture": (mk.gated_mixture, MAKE.gated_mixture(6, 7, ROUTING)),
    "joined logits": (mk.gated_mixture, MAKE.gated_mixture(6, 7, ROUTING, joined_logits=True)),
    "snr_trans": (mk.snr_trans, snr_trans(MAKE, 6, [4, 3], [5, 2])),
    "stacked snr_trans": (mk.snr_trans, snr_trans(MAKE, 6, [4, 4], [5, 5], stacked=True, stacked_inputs=True)),
    "snr_aver": (mk.snr_aver, snr_aver(MAKE, 6, 5, 3, 2)),
    "hard_concrete": (mk.hard_concrete, Case({"log_alpha": MAKE.leaf(3, 2), "noise": MAKE.leaf(3, 2)}, torch.float32)),
    "l0_penalty": (mk.l0_penalty, Case({"log_alpha": MAKE.leaf(3, 2)}, torch.float32)),
    "pcgrad": (pcgrad, Case({"grads": [[MAKE.leaf(4, 3), MAKE.leaf(2, 2)] for _ in range(3)]}, torch.float32)),
}
# These are no mistakes, in the arguments that are named: logits may be narrower than experts, noise is of any dtype and
# of one device with its only companion, and PCGrad takes sparse gradients.
TAKEN = {
    ("gated_mixture", "another dtype"): ("experts",),
    ("joined logits", "another dtype"): ("experts",),
    ("pcgrad", "sparse"): ("grads",),
    ("hard_concrete", "another dtype"): ("log_alpha", "noise"),
    ("l0_penalty", "another dtype"): ("log_alpha",),
    ("l0_penalty", "another device"): ("log_alpha",),
}


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
        if path[0] in TAKEN.get((name, kind), ()):
            continue
        mistaken = replaced(arguments, path, lambda t: KINDS[kind](t.detach()))
        named = "|".join(arguments) if kind in BESIDE_OTHERS else path[0]
        message = rf"^({named})(\[\d+\])* must .*, got "
        with torch.set_grad_enabled(wanted), pytest.raises((TypeError, ValueError), match=message):
            op(**mistaken)
