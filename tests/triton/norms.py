"""Cases for layerwise levels' Triton kernels; for the interpreter and for GPUs alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import mtlkernels as mk
from mtlkernels.ops.activations import CODES, WITH_SLOPES
from mtlkernels.testing import Case, CaseFactory
from tests.ops.agreement import assert_as_exact
from tests.ops.level import normalized

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PLE = mk.Routing.cgc(2, 2, 1, shared_gate=True)
FEW = mk.Routing((0, 1), ((1, 0), (1,)))  # where experts and gates are not what is tested: each more takes its time
Make = Callable[[str], Case]


def _case(
    dtype: torch.dtype, rows: int, widths: list[int], kinds: list[str], layout: str = "contiguous", **options: Any
) -> Make:
    options = {"activation": "silu", "eps": [0.1] * len(kinds), "routing": PLE, **options}

    def make(device: str) -> Case:
        factory = CaseFactory(0, dtype, device=device, layouts=[layout])
        return normalized.case(factory, rows, widths, options["routing"], kinds, **_without_routing(options))

    return make


def _with_wide_slopes(make: Make) -> Make:
    """Slopes in float32 beside scales and shifts in the dtype of the rest."""

    def made(device: str) -> Case:
        case = make(device)
        slopes = [[t.detach().float().requires_grad_() for t in layer] for layer in case.arguments["slopes"]]
        return Case({**case.arguments, "slopes": slopes}, case.dtype)

    return made


def _without_routing(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "routing"}


def cases(scale: int = 1) -> dict[str, Make]:
    """Small sizes for the interpreter; on a GPU, ``scale`` makes the batches of the larger ones larger."""
    both, mixed = ["batch", "batch"], ["layer", "batch"]
    found = {
        "aligned": _case(F32, 150 * scale, [32, 48, 16], both, routing=FEW),
        "aligned_dropout": _case(F32, 70 * scale, [32, 48, 16], mixed, dropout=[0.3, 0.1]),
        "odd": _case(F32, 67 * scale, [33, 21, 19], both, dropout=[0.0, 0.5]),
        "odd_layer_norm": _case(F32, 37 * scale, [33, 75, 19], ["layer", "layer"], dropout=[0.2, 0.0], routing=FEW),
        "dropout_alone": _case(F32, 37, [20, 70, 10], ["none", "none"], dropout=[0.3, 0.9]),
        "everything_dropped": _case(F32, 9, [5, 6], ["none"], dropout=[1.0]),
        "two_rows": _case(F32, 2, [7, 5], ["batch"]),
        "one_row": _case(F32, 1, [7, 5, 4], ["layer", "none"], dropout=[0.1, 0.1]),
        "no_rows": _case(F32, 0, [7, 6, 5], ["layer", "none"], dropout=[0.1, 0.0]),
        "three_layers": _case(
            F32, 40, [16, 32, 48, 16], ["batch", "none", "layer"], activation=["relu", "gelu", "tanh"]
        ),
        "no_scales": _case(F32, 35, [12, 16, 9], mixed, affine=[False, False]),
        "some_scales": _case(F32, 35, [12, 16, 9], mixed, affine=[False, True], biases=[True, False]),
        "many_blocks_of_rows": _case(F32, 140 * scale, [8, 70], ["batch"], eps=[1e-5], routing=FEW),
        "strided": _case(F32, 35, [16, 32, 16], mixed, "strided", dropout=[0.5, 0.0]),
        "unaligned": _case(F32, 35, [16, 32, 16], mixed, "offset"),
        "many_gates": _case(F32, 20, [8, 12], ["batch"], routing=mk.Routing.mmoe(3, 10)),
        "bf16": _case(BF16, 70 * scale, [32, 48, 16], both, dropout=[0.1, 0.0]),
        "bf16_odd": _case(BF16, 37, [19, 21, 9], mixed, dropout=[0.0, 0.2]),
        "f16": _case(F16, 70 * scale, [32, 48, 16], mixed),
        "f16_odd": _case(F16, 37, [19, 21, 9], both, dropout=[0.2, 0.2]),
    }
    for name in WITH_SLOPES:
        both_ways: dict[str, Any] = {"activation": name, "one_slope": [True, False]}
        few = {**both_ways, "routing": FEW}
        found |= {
            f"{name}_aligned": _case(F32, 150 * scale, [32, 48, 16], ["batch", "layer"], **few),
            f"{name}_odd": _case(F32, 67 * scale, [33, 75, 19], mixed, dropout=[0.2, 0.5], **few),
            f"{name}_alone": _case(F32, 37 * scale, [20, 70, 10], ["none", "none"], **both_ways),
            f"{name}_everything_dropped": _case(F32, 9, [5, 6], ["none"], dropout=[1.0], activation=name),
            f"{name}_one_row": _case(F32, 1, [7, 5, 4], ["layer", "none"], **both_ways),
            f"{name}_no_rows": _case(F32, 0, [7, 6, 5], ["layer", "none"], **both_ways),
            f"{name}_one_channel": _case(F32, 19, [7, 1, 1], ["none", "none"], **both_ways),
            f"{name}_wide": _case(F32, 5, [6, 140], ["none"], activation=name, one_slope=[True]),
            f"{name}_among_others": _case(
                F32, 40, [16, 32, 48, 16], ["none", "layer", "batch"], activation=["relu", name, "gelu"], routing=FEW
            ),
            f"{name}_strided": _case(F32, 35, [16, 32, 16], mixed, "strided", dropout=[0.5, 0.0], **few),
            f"{name}_bf16": _case(BF16, 70 * scale, [32, 48, 16], both, dropout=[0.1, 0.0], **few),
            f"{name}_f16_odd": _case(F16, 37, [19, 21, 9], ["layer", "none"], dropout=[0.0, 0.2], **few),
            f"{name}_mixed_dtypes": _with_wide_slopes(_case(BF16, 37, [19, 21, 9], mixed, **few)),
        }
    for kind in ("batch", "layer"):
        for name in CODES:
            found[f"{kind}_{name}"] = _case(F32, 18, [10, 12, 9], [kind, kind], activation=name, routing=FEW)
    return found


def check(name: str, device: str, scale: int = 1) -> None:
    """Outputs and gradients against the definition in float64, judged by the reference's error."""
    normalized.check(cases(scale)[name](device), "triton")


def check_gradients_asked_for(needs: tuple[bool, ...], activation: str, device: str) -> None:
    """Each set of gradients alone."""
    options: dict[str, Any] = {"affine": [False, True], "biases": [True, False], "one_slope": [True, False]}
    case = _case(F32, 35, [12, 16, 9], ["layer", "batch"], activation=activation, routing=FEW, **options)(device)
    names = ("inputs", "weights", "biases", "scales", "slopes", "gate_logits")
    wanted = {name for name, need in zip(names, needs, strict=True) if need}
    if "scales" in wanted:
        wanted.add("shifts")
    for name, leaves in case.leaves().items():
        for leaf in leaves:
            leaf.requires_grad_(name.partition("[")[0] in wanted)
    normalized.check(case, "triton")


def check_statistics(device: str) -> None:
    """Running statistics of norms after a step by the kernels, and by PyTorch's module."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(300, 16, generator=generator) + 100).to(device)
    weight = torch.randn(2, 20, 16, generator=generator).to(device)
    norms, usual = ([torch.nn.BatchNorm1d(20).to(device) for _ in range(2)] for _ in range(2))
    exact = copy.deepcopy(usual)
    with mk.use_backend("triton"):
        mk.expert_mixture(x, [weight], None, torch.zeros(300, 2, device=device), mk.Routing.mmoe(2, 1), norms=[norms])
    for e in range(2):
        usual[e](x @ weight[e].t())
        exact[e].double()(x.double() @ weight[e].double().t())
    buffers = ([[norm.running_mean, norm.running_var] for norm in each] for each in (norms, exact, usual))
    assert_as_exact(*buffers)
