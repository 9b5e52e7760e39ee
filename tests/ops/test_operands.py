"""Each operand that the C++ kernels would misread is refused, also where a call comes past the dispatcher.

The short ways do: they send a call to the CPU's kernels whatever its tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import CaseFactory
from tests import requires
from tests.ops.level import operator
from tests.ops.test_tensor_subclasses import Wrapped

pytestmark = requires.cpp_kernels
ROUTING = mk.Routing((0, 1, 0), ((0, 1), (2, 1, 0)))
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
ROWS, EXPERTS, GATES = 5, torch.zeros(5, 3, 4), ([0, 1, 0, 1, 2], [2, 3])
LOGITS = [torch.zeros(ROWS, 2), torch.zeros(ROWS, 3)]
U, Z, MATRICES = [torch.zeros(ROWS, 4) for _ in range(2)], torch.ones(3, 2), [torch.zeros(4, 4) for _ in range(6)]
GRADS = [torch.zeros(ROWS, 4) for _ in range(3)]
TASKS = [torch.zeros(3), torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, 2)]
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda t: t.short(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "wrapped": Wrapped,
    "another dimension": lambda t: torch.stack([t, t]),
    "no dimension": lambda t: torch.zeros((), dtype=t.dtype),
    "twice the rows": lambda t: torch.cat([t, t]),
    "twice the columns": lambda t: torch.cat([t, t], -1),
}
PLACES: dict[str, Callable[[Tensor], Tensor]] = {"cpu": lambda t: torch.zeros(t.shape, dtype=t.dtype), **WRONG}
# An operand, or a list of them, for which these are as good.
FINE = {
    "seed": {"no dimension"},
    "order": {"integers", "twice the columns"},
    "experts": {"twice the columns"},
}


def run(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.mtlkernels, name).default.redispatch(CPU_KEYS, *arguments)


def below(*arguments: Any) -> Any:
    return run("level_forward", *arguments)


def of_levels() -> Iterator[tuple[str, tuple[Any, ...]]]:
    plain = CaseFactory(0, torch.float32).expert_mixture(ROWS, [4, 6, 3], ROUTING).map(Tensor.detach)
    for operands in (
        operator.of_case(plain),
        operator.with_gate_layers(torch.float32, ROWS, False),
        operator.with_norms(torch.float32, ROWS, False),
    ):
        outputs, saved = operands.results(True, below)
        yield "level_forward", operands.forward(True)
        yield "level_backward", operands.backward([torch.ones_like(y) for y in outputs], saved, [True] * 8)
    *lists, ints, floats, _, _ = operator.with_gate_layers(torch.float32, ROWS, False).forward(False)
    folded = [None, torch.ones(3, 3), None, torch.ones(3)]
    yield "level_serve", (*lists, folded, folded, ints, floats)


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("gated_mixture_forward", (EXPERTS, LOGITS, *GATES)),
    ("gated_mixture_backward", (GRADS[:2], EXPERTS, LOGITS, *GATES, True, True)),
    ("snr_trans_forward", (U, MATRICES, Z)),
    ("snr_trans_forward", (U, [torch.zeros(3, 2, 4, 4)], Z)),
    ("snr_trans_backward", (GRADS, U, MATRICES, Z, True, True, True, True)),
    ("snr_aver_forward", (U, Z)),
    ("snr_aver_backward", (GRADS, U, Z, True, True, True)),
    ("pcgrad_gram", (TASKS, 2)),
    ("pcgrad_weights", (torch.eye(2).double(), torch.tensor([[1], [0]]), False, None, False, True, 1e-12, False)),
    ("pcgrad_combine", (TASKS, 2, torch.ones(2).double())),
]


def mistakes(name: str, arguments: tuple[Any, ...], wrong: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The call with one operand changed, for each of them; and which it is."""
    names = [argument.name for argument in getattr(torch.ops.mtlkernels, name).default._schema.arguments]
    for at, (argument, value) in enumerate(zip(names, arguments, strict=True)):
        several = isinstance(value, list)
        for i, tensor in enumerate(value if several else [value]):
            if not isinstance(tensor, Tensor) or wrong in FINE.get(argument, ()):
                continue
            # A slope for each channel is as good as one for all.
            if argument == "parameters" and tensor.shape == (1,) and wrong.startswith("twice"):
                continue
            if (name, argument, wrong) == ("snr_aver_forward", "z", "twice the rows"):  # more outputs
                continue
            changed = PLACES[wrong](tensor)
            given = [changed if i == j else other for j, other in enumerate(value)] if several else changed
            yield f"{argument}[{i}]", (*arguments[:at], given, *arguments[at + 1 :])


def check(name: str, arguments: tuple[Any, ...], wrong: str) -> None:
    run(name, *arguments)
    for what, mistaken in mistakes(name, arguments, wrong):
        with pytest.raises((ValueError, TypeError), match="^mtlkernels: "):
            run(name, *mistaken)
            pytest.fail(f"{name} takes {what}, {wrong}")


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_of_an_operator(name: str, arguments: tuple[Any, ...], wrong: str) -> None:
    check(name, arguments, wrong)


@pytest.mark.parametrize("wrong", WRONG)
def test_of_a_level(wrong: str) -> None:
    for name, arguments in of_levels():
        check(name, arguments, wrong)


@pytest.mark.parametrize("elsewhere", ["cpu", "meta"])
def test_meta_tensors_beside_others(elsewhere: str) -> None:
    """Also by the dispatcher, which then takes the kernel that computes shapes alone: one of them, or all but one."""
    others = "meta" if elsewhere == "cpu" else "cpu"
    for name, arguments in (*CALLS, *of_levels()):
        call, given = getattr(torch.ops.mtlkernels, name), on(others, arguments)
        call(*given)
        for _, mistaken in mistakes(name, given, elsewhere):
            kinds = f"({others}, got {elsewhere}|{elsewhere}, got {others})"
            with pytest.raises(
                ValueError, match=rf"^\w+(\[\d+\])? must be on the device of \w+(\[\d+\])?, {kinds}: move"
            ):
                call(*mistaken)


def on(device: str, arguments: Any) -> Any:
    """The arguments with their tensors there."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)


def test_which_of_the_tensors_is_on_meta() -> None:
    logits = [LOGITS[0], LOGITS[1].to("meta")]
    message = r"^gate_logits\[1\] must be on the device of experts, cpu, got meta: move one by .to\(device\)$"
    with pytest.raises(ValueError, match=message):
        torch.ops.mtlkernels.gated_mixture_forward(EXPERTS, logits, *GATES)
    with pytest.raises(ValueError, match=message):
        torch.ops.mtlkernels.gated_mixture_forward(EXPERTS.clone().requires_grad_(), logits, *GATES)


def test_stand_ins_on_meta() -> None:
    """Those who trace say themselves what may stand beside what."""
    with torch._subclasses.FakeTensorMode() as mode:
        experts, *logits = (mode.from_tensor(tensor) for tensor in (EXPERTS, *LOGITS))
        for made in (logits, [t.to("meta") for t in logits]):
            (y, _) = torch.ops.mtlkernels.gated_mixture_forward(experts, made, *GATES)
            assert y.shape == (ROWS, 4) and y.device.type == "cpu"


LEVEL = operator.with_gate_layers(torch.float32, ROWS, False)


def level(direction: str, changed: dict[int, Any]) -> tuple[Any, ...]:
    """Arguments of a level's operator, some of which are others."""
    arguments = LEVEL.forward(True)
    if direction == "backward":
        outputs, saved = LEVEL.results(True, below)
        arguments = LEVEL.backward([torch.ones_like(y) for y in outputs], saved, [True] * 8)
    return tuple(change(old) if (change := changed.get(at)) else old for at, old in enumerate(arguments))


COUNTS: dict[str, tuple[str, Callable[[], tuple[Any, ...]], str]] = {
    "no gate": ("gated_mixture_forward", lambda: (EXPERTS, [], [], []), "there must be a gate"),
    "an expert too few": (
        "gated_mixture_forward",
        lambda: (EXPERTS, LOGITS, [0, 1, 0, 1], [2, 3]),
        "gate_experts must hold an expert for each column of the gates, got 4 for 5",
    ),
    "no such expert": ("gated_mixture_forward", lambda: (EXPERTS, LOGITS, [0, 1, 0, 1, 3], [2, 3]), r"\[0, 3\), got 3"),
    "an expert before all": (
        "gated_mixture_forward",
        lambda: (EXPERTS, LOGITS, [0, -1, 0, 1, 2], [2, 3]),
        r"\[0, 3\), got -1",
    ),
    "a gate of fewer than none": (
        "gated_mixture_forward",
        lambda: (EXPERTS, [t[:, :n] for t, n in zip(LOGITS, (1, 3), strict=True)], [0, 1], [-1, 3]),
        r"gate_sizes must be in \[0, 2\].* got -1",
    ),
    "a gate of many": (
        "gated_mixture_forward",
        lambda: (EXPERTS, LOGITS, [0, 1, 0, 1, 2], [2**32 + 2, 3]),
        r"gate_sizes must be in \[0, 5\].* got 4294967298",
    ),
    "logits too few": ("gated_mixture_forward", lambda: (EXPERTS, LOGITS[:1], *GATES), "each of 2 gates, got 1"),
    "a gradient too few": (
        "gated_mixture_backward",
        lambda: (GRADS[:1], EXPERTS, LOGITS, *GATES, True, True),
        "grad_outputs must hold a tensor for each of 2 gates, got 1",
    ),
    "logits of float64": (
        "gated_mixture_forward",
        lambda: (EXPERTS, [t.double() for t in LOGITS], *GATES),
        r"gate_logits\[0\] must be float32 or narrower",
    ),
    "no stream": ("snr_aver_forward", lambda: ([], Z), "u must hold at least one matrix"),
    "streams of two widths": (
        "snr_aver_forward",
        lambda: ([U[0], torch.zeros(ROWS, 3)], Z),
        r"u\[1\] must have shape \[5, 4\]",
    ),
    "no gradients": ("snr_aver_backward", lambda: ([], U, Z, True, True, True), "each of 3 outputs, got 0"),
    "no tasks": ("pcgrad_gram", lambda: ([], 0), "num_tasks = 0"),
    "no rows of z": ("snr_aver_forward", lambda: (U, torch.ones(0, 2)), r"z must be a tensor \[I, 2\], got \[0, 2\]"),
    "inputs of a level": ("level_forward", lambda: level("forward", {0: lambda xs: xs[:-1]}), "inputs must hold 2"),
    "parameters": ("level_forward", lambda: level("forward", {1: lambda ps: ps[:-1]}), "parameters must hold 12"),
    "gates": ("level_forward", lambda: level("forward", {2: lambda ps: ps[:-1]}), "gates must hold 4 entries, got 3"),
    "grad_outputs": ("level_backward", lambda: level("backward", {0: lambda gs: gs * 2 + gs[:1]}), "got 5"),
    "no grad_outputs": ("level_backward", lambda: level("backward", {0: lambda gs: []}), "each of 2 gates.*got 0"),
    "no seed": (
        "level_forward",
        lambda: (*operator.with_norms(torch.float32, ROWS, False).forward(True)[:5], None, True),
        "dropout needs a seed",
    ),
    "saved": ("level_backward", lambda: level("backward", {4: lambda saved: saved[:-1]}), r"saved must hold \d+"),
}


@pytest.mark.parametrize("mistake", COUNTS)
def test_counts(mistake: str) -> None:
    name, arguments, message = COUNTS[mistake]
    with pytest.raises((ValueError, TypeError), match=f"^mtlkernels: .*{message}"):
        run(name, *arguments())
