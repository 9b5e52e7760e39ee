"""Experts whose activations learn slopes: PReLU, and torch-rechub's Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops import level as ops_level
from tests.convert.agreement import Inputs
from tests.convert.models import fill, ple, rechub_mmoe, rechub_ple
from tests.convert.test_parts import check, deepctr_inputs, rechub_inputs


def slope_by_channel(model: Any) -> Any:
    """In the last level also for one expert alone."""
    for level in model.cgc_layers:
        for expert in [*level.experts_specific, *level.experts_shared][: 8 if level is model.cgc_layers[0] else 1]:
            expert.mlp[2], expert.mlp[6] = nn.PReLU(12), nn.PReLU(7)
    return fill(model)


def other_dice(model: Any) -> Any:
    model.cgc_layers[1].experts_specific[0].mlp[2].epsilon = 0.1
    return model


# As in test_parts.py.
CASES: dict[str, tuple[Callable[[], Any], Inputs, str, list[int]]] = {
    "rechub PLE with PReLU": (
        lambda: rechub_ple(activation="prelu"),
        rechub_inputs,
        "8 experts of 2 layers with batch norm and 3 gates in one expert_mixture",
        [8, 8],
    ),
    "rechub PLE with a slope a channel": (
        lambda: slope_by_channel(rechub_ple(activation="prelu")),
        rechub_inputs,
        "8 experts of 2 layers with batch norm and 3 gates in one expert_mixture",
        [8, 8],
    ),
    "rechub PLE with Dice": (
        lambda: rechub_ple(activation="dice", levels=1, tasks=2, specific=3, shared=1),
        rechub_inputs,
        "7 experts of 2 layers with batch norm and 2 gates in one expert_mixture",
        [7],
    ),
    "rechub PLE with several Dice": (
        lambda: other_dice(rechub_ple(activation="dice")),
        rechub_inputs,
        "1 expert of 2 layers with batch norm in one expert_mixture, "
        "7 experts of 2 layers with batch norm in one expert_mixture, 3 gates in one gated_mixture",
        [8, 1, 7],
    ),
    "rechub MMOE with PReLU": (
        lambda: rechub_mmoe(activation="prelu"),
        rechub_inputs,
        "4 experts of 2 layers with batch norm and 3 gates in one expert_mixture",
        [4],
    ),
    "deepctr PLE with PReLU": (
        lambda: ple(dnn_activation="prelu"),
        deepctr_inputs,
        "8 experts of 2 layers and 3 gates in one expert_mixture",
        [8, 8],
    ),
}


@pytest.mark.usefixtures("any_rows")
@pytest.mark.parametrize("name", CASES)
def test_trains_and_serves_as_the_library(name: str, fused_calls: list[int]) -> None:
    check(*CASES[name], fused_calls, (1, 2, 33, 300))


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the direct way gave, call by call; words where it gave nothing."""
    if not _extension.has_module():
        pytest.skip("no direct way from this Python")
    direct, found = ops_level.direct, []

    def noted(*args: Any) -> Any:
        found.append(direct(*args))
        return found[-1]

    monkeypatch.setattr(ops_level, "direct", noted)
    return found


@pytest.mark.parametrize("name", CASES)
def test_serving_goes_the_direct_way(name: str, ways: list[Any]) -> None:
    """A call that is checked in Python folds batch norms there, which takes longer than the library's own code."""
    make, inputs, _, experts = CASES[name]
    model = make().eval()
    assert mk.convert(model).replaced
    ways.clear()  # of trials
    with torch.inference_mode():
        model(*inputs(300, 0, torch.float32))
    assert len(ways) == len(experts)
    assert [way for way in ways if isinstance(way, str)] == []


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_trunks_serve_by_the_direct_way(activation: str, batch_norm: bool, ways: list[Any]) -> None:
    trunk = mk.nn.MMoE(6, 2, (5, 4), num_experts=3, activation=activation, batch_norm=batch_norm).eval()
    with torch.inference_mode():
        trunk(torch.randn(3, 6))
    assert len(ways) == 1 and isinstance(ways[0], tuple)


@pytest.mark.parametrize("gates", ["lists", "biases", "a stream each", "another width", "norms", "joined"])
def test_linear_gates_beside_slopes(gates: str, ways: list[Any]) -> None:
    """Logits are made of plain ones where C++ serves; all others are checked, and have the same meaning."""
    several = gates == "a stream each"
    routing = mk.Routing((0, 1, 0), ((0, 1), (2, 1, 0))) if several else mk.Routing.mmoe(3, 2)
    sizes = [len(mixed) for mixed in routing.gate_experts]
    x = [torch.randn(4, 5) for _ in range(2)]
    weights, slopes = [[torch.randn(6, 5) for _ in range(3)]], [[torch.rand(1) for _ in range(3)]]
    own: dict[str, Any] = {"gate_weights": [torch.randn(size, 5 + (gates == "another width")) for size in sizes]}
    if gates == "biases":
        own["gate_biases"] = [torch.randn(sizes[0]), None]
    elif gates == "norms":
        own["gate_norms"] = [nn.BatchNorm1d(sizes[0]).eval(), None]
    elif gates == "joined":
        own["gate_weights"] = torch.cat(own["gate_weights"])

    def call(logits: Any, **options: Any) -> Any:
        inputs = x if several else x[0]
        return mk.expert_mixture(inputs, weights, None, logits, routing, activation="prelu", slopes=slopes, **options)

    with torch.no_grad():
        if gates == "another width":
            with pytest.raises(ValueError, match="gate_weights"):
                call(None, **own)
            return
        found = call(None, **own)
        split = own["gate_weights"].split(sizes) if gates == "joined" else own["gate_weights"]
        biases = own.get("gate_biases", [None] * 2)
        logits = [F.linear(x[k * several], w, b) for k, (w, b) in enumerate(zip(split, biases, strict=True))]
        if gates == "norms":
            logits[0] = own["gate_norms"][0](logits[0])
        exact = call(logits)
    for y, true in zip(found, exact, strict=True):
        torch.testing.assert_close(y, true)
    assert isinstance(ways[0], str) == (gates == "norms")


def test_slopes_that_do_not_fit() -> None:
    """They fail when called, in a trial as in the library, so nothing is read beyond them."""
    model = rechub_mmoe()
    model.experts[1].mlp[2] = nn.PReLU(5)
    (line,) = mk.convert(model).left_alone
    assert "it fails in a trial: RuntimeError: Mismatch of parameter numbers" in line.detail
    with pytest.raises(RuntimeError, match="Mismatch of parameter numbers"):
        model(*rechub_inputs(9, 0, torch.float32))


def test_dice_without_eps_is_left_to_modules() -> None:
    """Of a row of equal values it is not a number, which the operator does not promise."""
    model = rechub_mmoe(activation="dice")
    model.experts[0].mlp[2].epsilon = 0.0
    assert "1 expert as modules, because of Dice with epsilon 0 (experts.0.mlp.2)" in str(mk.convert(model))
