"""expert_mixture with norms and dropout against its formula, over every implementation and dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mtlkernels as mk
from mtlkernels.ops._random import dropout_factors
from mtlkernels.ops.activations import ACTIVATIONS, WITH_SLOPES
from mtlkernels.testing import LAYOUTS, Case, CaseFactory, evaluate
from tests.ops.level import normalized
from tests.ops.level.definition import kept, philox
from tests.ops.level.normalized import check

CASES = 12
PLE = mk.Routing.cgc(2, 2, 1, shared_gate=True)
NORMS = pytest.mark.parametrize("kind", ["batch", "layer"])


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(normalized.random_case(seed, dtype), backend, threads=1 + seed % 2)


@NORMS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(0, dtype)
    check(normalized.case(make, 65, [19, 24, 33], PLE, [kind, kind], activation=activation), backend)


@pytest.mark.parametrize("kinds", [["none", "none"], ["batch", "none"], ["layer", "batch"], ["batch", "batch"]])
@pytest.mark.parametrize("one_slope", [[True, True], [False, False]])
@pytest.mark.parametrize("activation", WITH_SLOPES)
def test_slopes(activation: str, one_slope: list[bool], kinds: list[str], dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(16, dtype)
    options = {"activation": activation, "one_slope": one_slope, "dropout": [0.0, 0.2]}
    check(normalized.case(make, 65, [19, 24, 33], PLE, kinds, **options), backend)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 16, 17, 100, 1537])
@pytest.mark.parametrize("activation", WITH_SLOPES)
def test_rows_with_slopes(activation: str, rows: int, dtype: torch.dtype, backend: str) -> None:
    """Without norm and dropout, in which any number of rows will do."""
    make = CaseFactory(17, dtype)
    check(normalized.case(make, rows, [9, 40, 1, 12], PLE, ["none"] * 3, activation=activation), backend)


@pytest.mark.parametrize("rows", normalized.ROWS)
@NORMS
def test_rows(rows: int, kind: str, backend: str) -> None:
    make = CaseFactory(1, torch.float32)
    # Two rows that are nearly equal make a standardization that no precision survives; a large eps bounds its slope.
    options = {"activation": "silu", "dropout": [0.2, 0.1], "eps": [0.1, 0.1]}
    check(normalized.case(make, rows, [20, 24, 16], PLE, [kind, kind], **options), backend)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int, dtype: torch.dtype, backend: str) -> None:
    """Layer norm and dropout take any number of rows."""
    make = CaseFactory(2, dtype)
    check(normalized.case(make, rows, [9, 12, 7], PLE, ["layer", "none"], dropout=[0.3, 0.3]), backend)


@NORMS
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_row_blocks(threads: int, kind: str, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(3, dtype)
    check(normalized.case(make, 1537, [20, 24, 16], PLE, [kind, kind], activation="silu"), backend, threads)


@NORMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(4, dtype, layouts=[layout])
    check(normalized.case(make, 33, [18, 16, 20], PLE, [kind, kind], activation="tanh", eps=[0.1, 0.1]), backend)


@NORMS
@pytest.mark.parametrize("affine", [[True, False], [False, False]])
@pytest.mark.parametrize("biases", [[True, False], [False, True]])
def test_without_scales_or_biases(
    affine: list[bool], biases: list[bool], kind: str, dtype: torch.dtype, backend: str
) -> None:
    make = CaseFactory(5, dtype)
    options = {"affine": affine, "biases": biases, "activation": "tanh"}
    check(normalized.case(make, 40, [9, 8, 17], PLE, [kind, kind], **options), backend)


@pytest.mark.parametrize("kinds", [["batch", "none", "layer"], ["none", "batch", "none"], ["layer", "batch", "batch"]])
def test_norms_that_differ_by_layer(kinds: list[str], dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(6, dtype)
    names = ["relu", "gelu", "sigmoid"]
    check(normalized.case(make, 50, [9, 8, 17, 6], PLE, kinds, activation=names, dropout=[0.0, 0.5, 0.1]), backend)


@pytest.mark.parametrize("experts, gates", [(64, 65), (130, 3), (2, 100)])
def test_many_experts_and_gates(experts: int, gates: int, backend: str) -> None:
    make = CaseFactory(7, torch.float32)
    check(normalized.case(make, 5, [6, 8], mk.Routing.mmoe(experts, gates), ["batch"], dropout=[0.2]), backend)


@NORMS
def test_wide_layers(kind: str, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(8, dtype)
    check(normalized.case(make, 66, [513, 260, 300], mk.Routing.mmoe(2, 2), [kind, kind], activation="silu"), backend)


@NORMS
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_mean_far_from_zero(kind: str, offset: float, backend: str) -> None:
    """No variance is the difference of two large numbers: the error is that of a sum as large as the mean."""
    case = normalized.case(CaseFactory(9, torch.float32), 300, [12, 10], PLE, [kind], activation="tanh")
    with torch.no_grad():
        for bias in case.arguments["biases"][0]:
            bias.add_(offset)
    check(case, backend)


def test_low_precision_beside_float32_parameters(backend: str) -> None:
    """Norms keep float32 parameters where the rest of a model is in lower precision."""
    case = normalized.case(CaseFactory(10, torch.bfloat16), 64, [12, 10, 9], PLE, ["batch", "layer"], activation="silu")
    wide = dict(case.arguments)
    for name in ("scales", "shifts"):
        wide[name] = [[t.detach().float().requires_grad_() for t in layer] for layer in wide[name]]
    check(Case(wide, case.dtype), backend)  # which holds dtypes against PyTorch's as well


@pytest.mark.parametrize("frozen", [["inputs"], ["weights", "biases"], ["scales", "shifts"], ["gate_logits"]])
def test_frozen_arguments(frozen: list[str], backend: str) -> None:
    make = CaseFactory(11, torch.float32)
    case = normalized.case(make, 20, [12, 10, 9], PLE, ["batch", "layer"], activation="silu", dropout=[0.1, 0.0])
    with mk.use_backend(backend):
        full = evaluate(normalized.fused, case)
        for name, leaves in case.leaves().items():
            for leaf in leaves:
                leaf.requires_grad_(name.partition("[")[0] not in frozen)
        found = evaluate(normalized.fused, case)
    torch.testing.assert_close(found, {name: full[name] for name in found})


def test_experts_without_a_gate_are_not_evaluated(backend: str) -> None:
    routing = mk.Routing((0, 0, 0), ((2, 0),))
    case = normalized.case(CaseFactory(12, torch.float32), 8, [5, 4], routing, ["batch"], dropout=[0.5])
    check(case, backend)
    with torch.no_grad():
        case.arguments["weights"][0][1].fill_(float("nan"))
    with mk.use_backend(backend):
        for name, group in evaluate(normalized.fused, case).items():
            assert all(torch.isfinite(t).all() for t in group)
            assert name in ("outputs", "inputs", "gate_logits") or not group[1].any()


def test_repeats_exactly(dtype: torch.dtype, backend: str) -> None:
    torch.set_num_threads(2)
    make = CaseFactory(13, dtype)
    case = normalized.case(make, 300, [12, 10, 11], PLE, ["batch", "layer"], dropout=[0.1, 0.2])
    with mk.use_backend(backend):
        first, second = evaluate(normalized.fused, case), evaluate(normalized.fused, case)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_what_is_dropped(threads: int, backend: str) -> None:
    case = normalized.case(CaseFactory(14, torch.float32), 300, [12, 64], PLE, ["none"], dropout=[0.5])
    with mk.use_backend(backend):
        expected = normalized.fused(**case.arguments)
        torch.set_num_threads(threads)
        got = normalized.fused(**case.arguments)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.9, 1.0])
def test_rates(rate: float, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(15, dtype)
    check(normalized.case(make, 70, [12, 33, 18], PLE, ["none", "none"], dropout=[0.1, rate]), backend)


def test_share_that_is_dropped(backend: str) -> None:
    """Of 2^20 values, within five standard deviations; and each call draws anew."""
    x, weight = torch.ones(1024, 1), torch.ones(1, 1024, 1)
    logits, routing = torch.zeros(1024, 1), mk.Routing.mmoe(1, 1)
    with mk.use_backend(backend):
        first, second = (mk.expert_mixture(x, [weight], None, logits, routing, dropout=0.3)[0] for _ in range(2))
    for y in (first, second):
        assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        assert abs(float((y == 0).double().mean()) - 0.3) < 5 * (0.3 * 0.7) ** 0.5 / 1024
    both = float(((first == 0) & (second == 0)).double().mean())
    assert abs(both - 0.09) < 5 * (0.09 * 0.91) ** 0.5 / 1024


def test_reproducible_by_torchs_generator(backend: str) -> None:
    x, weight = torch.ones(30, 1), torch.ones(1, 40, 1)
    logits, routing = torch.zeros(30, 1), mk.Routing.mmoe(1, 1)

    def draw() -> torch.Tensor:
        return mk.expert_mixture(x, [weight], None, logits, routing, dropout=0.5)[0]

    with mk.use_backend(backend):
        torch.manual_seed(3)
        first, second = draw(), draw()
        torch.manual_seed(3)
        assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)


# The generator's published test vectors: counters, keys and words.
VECTORS = [
    ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_the_tests_own_generator(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    found = philox([np.array([c], dtype=np.uint64) for c in counter], key)
    assert tuple(int(word[0]) for word in found) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 2])
@pytest.mark.parametrize("rate", [1e-9, 0.5, 1.0])
def test_masks(seed: int, rate: float) -> None:
    experts = (0, 4, 2)
    factors = dropout_factors(torch.tensor([seed]), 2, experts, (5, 9), rate, torch.float64)
    for factor, e in zip(factors, experts, strict=True):
        mask = kept(seed, 2, e, 5, 9, rate)
        assert torch.equal(factor, mask.double() * (1 / (1 - rate) if rate < 1 else 0.0))
