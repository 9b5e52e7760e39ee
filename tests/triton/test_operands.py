"""Launchers refuse what their kernels would misread, as the C++ kernels do; nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import mtlkernels as mk  # noqa: E402
from mtlkernels import _extension  # noqa: E402
from mtlkernels.ops.gated_mixture import triton as mixture  # noqa: E402
from mtlkernels.ops.level import triton as level  # noqa: E402
from mtlkernels.ops.level.spec import BATCH_NORM, Groups  # noqa: E402
from mtlkernels.ops.pcgrad import triton as pcgrad  # noqa: E402
from mtlkernels.ops.snr_aver import triton as snr_aver  # noqa: E402
from mtlkernels.ops.snr_trans import triton as snr_trans  # noqa: E402
from mtlkernels.testing import CaseFactory  # noqa: E402
from tests.ops.level.operator import Operands, of_case, with_gate_layers, with_norms  # noqa: E402

Change = Callable[[Tensor], Tensor]
CASE = CaseFactory(0, torch.float32).expert_mixture(5, [4, 6, 3], mk.Routing((0, 1, 0), ((0, 1), (2, 1, 0))))
LEVELS = {
    "logits": of_case(CASE),
    "gates": with_gate_layers(torch.float32, 5, False),
    "norms": with_norms(torch.float32, 5, False),
}
CHANGES: dict[str, tuple[Change, type[Exception], str]] = {
    "half": (lambda t: t.half(), TypeError, "torch.float16"),
    "elsewhere": (lambda t: t.to("meta"), ValueError, "got meta"),
    "longer": (lambda t: torch.cat([t, t[..., :1]], -1), ValueError, r"got \["),
    "sparse": (lambda t: t.to_sparse(), TypeError, "[sS]parse"),
}
GROUPS = [
    (name, group)
    for name, operands in LEVELS.items()
    for group, size in zip(Groups._fields, operands.spec.sizes, strict=True)
    if size
]
NAMES = {"gates": {"logits": "gate_logits", "norms": "gate_logits", "gates": "gate_weights"}}


def changed(operands: Operands, group: str, change: Change) -> Operands:
    """The last tensor of a group is another one."""
    names = operands.spec.spread(Groups._fields)
    at = max(i for i, t in enumerate(operands.tensors) if names[i] == group and t is not None)
    return replace(
        operands,
        tensors=[change(t.detach()) if i == at and t is not None else t for i, t in enumerate(operands.tensors)],
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_forward_of_a_level(name: str, group: str, change: str) -> None:
    change_of, error, words = CHANGES[change]
    wrong = changed(LEVELS[name], group, change_of).forward(True)
    argument = NAMES.get(group, {}).get(name, group)
    with pytest.raises(error, match=rf"^{argument}\[\d+\] must .*{words}"):
        level.forward(*wrong)
    if _extension.loaded() and change not in ("elsewhere", "sparse"):  # with these the dispatcher calls other kernels
        with pytest.raises(error, match=argument):
            torch.ops.mtlkernels.level_forward(*wrong)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["grad_outputs", "saved"])
@pytest.mark.parametrize("name", LEVELS)
def test_backward_of_a_level(name: str, which: str, change: str) -> None:
    change_of, error, words = CHANGES[change]
    operands = LEVELS[name]
    spec, x = operands.spec, operands.tensors[0]
    assert x is not None
    weights = [t.shape[0] for t in spec.split(operands.tensors).weights[:: len(spec.expert_inputs)]]
    saved = [torch.zeros(len(spec.expert_inputs), 5, width) for width in weights]
    norms = [(layer.norm, width) for layer, width in zip(spec.layers, weights, strict=True) if layer.norm]
    stats = [torch.zeros(len(spec.expert_inputs), width if norm == BATCH_NORM else 5) for norm, width in norms]
    signs = [(len(spec.expert_inputs), 5, -(-weights[i] // 32)) for i in spec.hidden_signs]
    saved += [torch.zeros(shape, dtype=torch.int32) for shape in signs]
    saved += stats * 2 + [torch.zeros(5, sum(spec.gate_sizes))] * bool(spec.gate_inputs)
    grads = [torch.zeros(5, weights[-1]) for _ in spec.gate_sizes]
    lists = {"grad_outputs": grads, "saved": saved}
    lists[which][0] = change_of(lists[which][0])
    with pytest.raises(error, match=rf"^{which}\[0\] must .*{words}"):
        level.backward(*operands.backward(grads, saved, [True] * 8))


def test_counts_of_a_level() -> None:
    operands = LEVELS["norms"]
    inputs, parameters, gates, *rest = operands.forward(True)
    with pytest.raises(ValueError, match=r"^inputs, parameters and gates must hold an entry for each of"):
        level.forward(inputs, parameters[:-1], gates, *rest)
    with pytest.raises(ValueError, match=r"^dropout needs a seed"):
        level.forward(*replace(operands, seed=None).forward(True))
    with pytest.raises(TypeError, match=r"^seed\[0\] must be torch.int64, got torch.int32"):
        level.forward(*replace(operands, seed=torch.zeros(1, dtype=torch.int32)).forward(True))
    with pytest.raises(ValueError, match=r"^grad_outputs must hold an entry for each of 2 gates, .*, got 3"):
        level.backward(*operands.backward([None] * 3, [], [True] * 8))
    with pytest.raises(ValueError, match=r"^saved must hold an entry for each of 7"):
        level.backward(*operands.backward([None] * 2, [], [True] * 8))


def refusals() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]]:
    """Calls of the other operators that kernels would misread."""
    experts, logits = torch.zeros(5, 3, 4), [torch.zeros(5, 2), torch.zeros(5, 3)]
    gates = ([0, 1, 0, 1, 2], [2, 3])
    grads = [torch.zeros(5, 4), torch.zeros(5, 4)]
    u, z = [torch.zeros(5, 4), torch.zeros(5, 4)], torch.ones(3, 2)
    weights = [torch.zeros(4, 4) for _ in range(6)]
    flat, double = [torch.zeros(3), torch.zeros(3), torch.zeros(2, 2), None], torch.float64
    gram = torch.eye(2, dtype=double)
    half, meta = [logits[0], logits[1].half()], torch.zeros(5, 4, device="meta")
    options = (False, None, False, True, 1e-12, False)
    return {
        "experts 2-D": (mixture.forward, (experts[0], logits, *gates), TypeError, r"experts must be .*, got 2-D"),
        "logits of two dtypes": (mixture.forward, (experts, half, *gates), TypeError, r"gate_logits\[1\] .*float16"),
        "logits float64": (
            mixture.forward,
            (experts, [t.double() for t in logits], *gates),
            TypeError,
            r"gate_logits\[0\] .*float64",
        ),
        "a gate too few": (mixture.forward, (experts, logits[:1], *gates), ValueError, "each of 2 gates, got 1"),
        "no such expert": (mixture.forward, (experts, logits, [0, 1, 0, 1, 3], [2, 3]), ValueError, r"in \[0, 3\)"),
        "gradients elsewhere": (
            mixture.backward,
            ([grads[0], meta], experts, logits, *gates, True, True),
            ValueError,
            r"grad_outputs\[1\] must be on cpu, got meta",
        ),
        "a stream of half": (snr_trans.forward, ([u[0], u[1].half()], weights, z), TypeError, r"u\[1\] .*float16"),
        "a weight's shape": (
            snr_trans.forward,
            (u, [*weights[:5], torch.zeros(4, 3)], z),
            ValueError,
            r"weights\[5\] .*\[4, 4\], got \[4, 3\]",
        ),
        "weights too few": (snr_trans.forward, (u, weights[:5], z), ValueError, "each of 6 routes, got 5"),
        "z elsewhere": (snr_trans.forward, (u, weights, z.to("meta")), ValueError, r"z\[0\] must be on cpu, got meta"),
        "z's shape": (snr_aver.forward, (u, torch.ones(3, 3)), ValueError, r"z must have shape \[I, 2\], got \[3, 3\]"),
        "streams of two widths": (snr_aver.forward, ([u[0], u[1][:, :3]], z), ValueError, r"u\[1\] .*got \[5, 3\]"),
        "gradients too few": (
            snr_aver.backward,
            (grads, u, z, True, True, False),
            ValueError,
            "each of 3 outputs, got 2",
        ),
        "tasks of two dtypes": (pcgrad.gram, ([flat[0], torch.zeros(3).half()], 2), TypeError, r"grads\[1\]\[0\] must"),
        "entries": (pcgrad.gram, (flat[:3], 2), ValueError, "num_tasks = 2 entries a parameter, got 3"),
        "gram in float32": (pcgrad.weights, (gram.float(), None, *options), TypeError, "gram must be float64"),
        "an order's rows": (
            pcgrad.weights,
            (gram, torch.zeros(3, 1, dtype=torch.int64), *options),
            ValueError,
            "order must have a row for each of 2 tasks",
        ),
        "coefficients in float32": (pcgrad.combine, (flat, 2, torch.ones(2)), ValueError, r"\[2\] in float64, got"),
        "coefficients elsewhere": (
            pcgrad.combine,
            (flat, 2, torch.ones(2, dtype=double, device="meta")),
            ValueError,
            "grads must be on meta as coefficients are, got cpu",
        ),
        "no gradient": (
            pcgrad.combine,
            ([None, None], 2, torch.ones(2, dtype=double)),
            ValueError,
            "a gradient for each parameter, got none for 0",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_other_operators(name: str) -> None:
    launcher, arguments, error, words = refusals()[name]
    with pytest.raises(error, match=words):
        launcher(*arguments)


@pytest.mark.parametrize(
    ("matmul", "everywhere", "expected"),
    [("none", "none", "ieee"), ("tf32", "none", "tf32"), ("ieee", "none", "ieee"), ("none", "tf32", "tf32")],
)
def test_precision_by_pytorchs_newer_setting(matmul: str, everywhere: str, expected: str) -> None:
    """Its older one, ``allow_tf32``, cannot even be read where the newer one says otherwise."""
    from mtlkernels.ops._triton import Kind

    switch, general = torch.backends.cuda.matmul, torch.backends
    before = switch.fp32_precision, general.fp32_precision
    try:
        general.fp32_precision, switch.fp32_precision = everywhere, matmul
        assert Kind.of(torch.float32, True).precision == expected
        assert Kind.of(torch.bfloat16, True).precision == "ieee"
    finally:
        switch.fp32_precision, general.fp32_precision = before


@pytest.mark.parametrize("allowed", [False, True])
def test_precision_by_pytorchs_older_setting(allowed: bool) -> None:
    from mtlkernels.ops._triton import Kind

    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    try:
        switch.allow_tf32 = allowed
        assert Kind.of(torch.float32, True).precision == ("tf32" if allowed else "ieee")
    finally:
        switch.allow_tf32 = before
