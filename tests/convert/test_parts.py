"""Levels that cannot be fused as a whole: groups of experts, experts by their modules, and one mixing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import gates
from tests.convert import doubles
from tests.convert.agreement import Inputs, assert_converts, tensors
from tests.convert.models import by_name, features, fill, mmoe, ple, rechub_mmoe, rechub_ple
from tests.ops.agreement import assert_as_exact

WIDTH, TASKS = 10, 3


def deepctr_inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (features(rows, seed).to(dtype),)


def rechub_inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (by_name(features(rows, seed).to(dtype)),)


def streams(rows: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(TASKS + 1, rows, WIDTH, generator=generator).to(dtype))


def easyrec_inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    *tasks, shared = streams(rows, seed, dtype)
    return tasks, shared


def one_list(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (streams(rows, seed, dtype),)


def one_tensor(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (streams(rows, seed, dtype)[0],)


class Wobble(nn.Module):
    """An activation that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def level(kind: Any, units: tuple[int, ...] = (12, 7), **options: Any) -> Any:
    return fill(kind(WIDTH, units, **options))


def exchanged(model: Any) -> Any:
    expert = model.cgc_layers[1].experts_specific[0].mlp
    expert[0], expert[1], expert[4] = nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 7)
    return fill(model)


def batch_statistics(model: Any) -> Any:
    model.cgc_layers[1].experts_shared[1].mlp[1] = nn.BatchNorm1d(12, track_running_stats=False)
    return fill(model)


def gate_layer_norm(model: Any) -> Any:
    model.cgc_layers[1].gates_specific[2].mlp[1] = nn.LayerNorm(4)
    return fill(model)


def parametrized(model: Any) -> Any:
    nn.utils.parametrizations.weight_norm(model.shared_experts[1][0][0].linears[0])
    return model


def own_expert(model: Any) -> Any:
    model.specific_experts[1][1][0] = nn.Sequential(nn.Linear(7, 9), Wobble(), nn.Linear(9, 7))
    return fill(model)


def other_activation(model: Any) -> Any:
    model.specific_experts[1][2][1].activation_layers[0] = nn.Tanh()
    return model


# The model, its inputs, the last line of its report, and the experts of each fused call when it serves.
CASES: dict[str, tuple[Callable[[], Any], Inputs, str, list[int]]] = {
    "rechub PLE with an activation of its own": (
        lambda: rechub_ple(activation=Wobble),
        rechub_inputs,
        "8 experts as modules, because of Wobble (experts_specific.0.mlp.2), 3 gates in one gated_mixture",
        [],
    ),
    "rechub PLE with an exchanged expert": (
        lambda: exchanged(rechub_ple()),
        rechub_inputs,
        "1 expert of 2 layers with batch norm in one expert_mixture, "
        "7 experts of 2 layers with batch norm in one expert_mixture, 3 gates in one gated_mixture",
        [8, 1, 7],
    ),
    "rechub PLE with batch statistics in evaluation": (
        lambda: batch_statistics(rechub_ple()),
        rechub_inputs,
        "8 experts of 2 layers with batch norm and 3 gates in one expert_mixture",
        [8, 7, 1],
    ),
    "rechub PLE with layer norm on logits": (
        lambda: gate_layer_norm(rechub_ple()),
        rechub_inputs,
        "8 experts of 2 layers with batch norm and 3 gates in one expert_mixture",
        [8, 8],
    ),
    "deepctr PLE with an activation of its own": (
        lambda: ple(dnn_activation=Wobble),
        deepctr_inputs,
        "8 experts as modules, because of Wobble (specific_experts.1.0.0.activation_layers.0), "
        "3 gates in one gated_mixture; "
        "gate 0 as modules, because of Wobble (specific_gate_dnn.1.0.0.activation_layers.0); "
        "gate 1 as modules, because of Wobble (specific_gate_dnn.1.1.0.activation_layers.0); "
        "gate 2 as modules, because of Wobble (specific_gate_dnn.1.2.0.activation_layers.0)",
        [],
    ),
    "deepctr MMOE with an activation of its own": (
        lambda: mmoe(dnn_activation=Wobble, gate_dnn_hidden_units=()),
        deepctr_inputs,
        "4 experts as modules, because of Wobble (expert_dnn.0.activation_layers.0), 3 gates in one gated_mixture",
        [],
    ),
    "deepctr PLE with a parametrized expert": (
        lambda: parametrized(ple()),
        deepctr_inputs,
        "7 experts of 2 layers in one expert_mixture, 1 expert as modules, because of ParametrizedLinear before the "
        "first Linear (shared_experts.1.0.0.linears.0), 3 gates in one gated_mixture",
        [8, 7],
    ),
    "deepctr PLE with an expert of another class": (
        lambda: own_expert(ple()),
        deepctr_inputs,
        "7 experts of 2 layers in one expert_mixture, 1 expert as modules, because of Wobble "
        "(specific_experts.1.1.0.1), 3 gates in one gated_mixture",
        [8, 7],
    ),
    "deepctr PLE with unequal activations": (
        lambda: other_activation(ple()),
        deepctr_inputs,
        "7 experts of 2 layers in one expert_mixture, 1 expert of 2 layers in one expert_mixture, "
        "3 gates in one gated_mixture",
        [8, 7, 1],
    ),
    "ExtractionNet with deeper specific experts": (
        lambda: level(doubles.ExtractionNet, shared_units=(7,)),
        easyrec_inputs,
        "6 experts of 2 layers in one expert_mixture, 2 experts of 1 layer in one expert_mixture, "
        "4 gates in one gated_mixture",
        [6, 2],
    ),
    "ExtractionNet with more experts for some tasks": (
        lambda: level(doubles.ExtractionNet, specific=(1, 3, 2)),
        easyrec_inputs,
        "8 experts of 2 layers and 4 gates in one expert_mixture",
        [8],
    ),
    "ExtractionNet with wider shared experts": (
        lambda: level(doubles.ExtractionNet, shared_units=(20, 7), norm="batch", last=True),
        easyrec_inputs,
        "6 experts of 2 layers with batch norm in one expert_mixture, "
        "2 experts of 2 layers with batch norm in one expert_mixture, 3 gates in one gated_mixture",
        [6, 2],
    ),
    "CGC_Layer with an exchanged activation": (
        lambda: exchanged_block(level(doubles.CGC_Layer)),
        one_list,
        "7 experts of 2 layers in one expert_mixture, 1 expert of 2 layers in one expert_mixture, "
        "4 gates in one gated_mixture",
        [7, 1],
    ),
    "MMoE_Layer with an expert of layer norm": (
        lambda: normed_block(level(doubles.MMoE_Layer)),
        one_tensor,
        "3 experts of 2 layers in one expert_mixture, 1 expert of 2 layers with layer norm in one expert_mixture, "
        "3 gates in one gated_mixture",
        [3, 1],
    ),
    "MMoE_Layer with an expert of group norm": (
        lambda: grouped_block(level(doubles.MMoE_Layer)),
        one_tensor,
        "3 experts of 2 layers in one expert_mixture, 1 expert as modules, because of GroupNorm (experts.2.mlp.3.0), "
        "3 gates in one gated_mixture",
        [3],
    ),
    "ExtractionNet with layer norm": (
        lambda: level(doubles.ExtractionNet, norm="layer", last=True),
        easyrec_inputs,
        "8 experts of 2 layers with layer norm and 3 gates in one expert_mixture",
        [8],
    ),
}


def exchanged_block(model: Any) -> Any:
    model.shared_experts[1].mlp[1] = nn.PReLU()
    return model


def normed_block(model: Any) -> Any:
    model.experts[2].mlp[3] = nn.Sequential(nn.LayerNorm(7), nn.ReLU())
    return model


def grouped_block(model: Any) -> Any:
    model.experts[2].mlp[3] = nn.Sequential(nn.GroupNorm(1, 7), nn.ReLU())
    return model


def check(
    make: Callable[[], Any],
    inputs: Inputs,
    detail: str,
    calls: list[int],
    fused_calls: list[int],
    serve: tuple[int, ...],
) -> None:
    """A model trains and serves as before, its report ends so, and its calls when it serves have so many experts."""
    report = assert_converts(make(), inputs, serve=serve)
    assert not report.left_alone
    assert report.lines[-1].detail == detail
    only_mixing = " as modules" in detail and "expert_mixture" not in detail
    assert report.lines[-1].action == ("mixing fused" if only_mixing else "replaced")
    model = make().eval()
    mk.convert(model)
    for count in (20, 300):
        fused_calls.clear()
        with torch.no_grad():
            model(*inputs(count, 0, torch.float32))
        assert fused_calls == calls


@pytest.mark.usefixtures("any_rows")
@pytest.mark.parametrize("name", CASES)
def test_trains_and_serves_as_the_library(name: str, fused_calls: list[int]) -> None:
    check(*CASES[name], fused_calls, (300,) if "batch statistics" in name else (1, 2, 33, 300))


def batch_norm_models() -> dict[str, tuple[Callable[[], Any], Inputs]]:
    """With training batch norm everywhere, and rows enough for mixing to pay."""
    return {
        "rechub PLE": (lambda: rechub_ple(), rechub_inputs),
        "rechub PLE of three levels": (lambda: rechub_ple(levels=3, tasks=2, specific=3, shared=1), rechub_inputs),
        "rechub MMOE": (lambda: rechub_mmoe(activation="sigmoid"), rechub_inputs),
        "deepctr PLE": (lambda: ple(dnn_use_bn=True), deepctr_inputs),
        "deepctr MMOE": (lambda: mmoe(dnn_use_bn=True, gate_dnn_hidden_units=()), deepctr_inputs),
        "ExtractionNet": (lambda: level(doubles.ExtractionNet, norm="batch"), easyrec_inputs),
        "MMoE of TorchEasyRec": (lambda: level(doubles.MMoE, gate=(6,), norm="batch"), one_tensor),
        "CGC_Layer": (lambda: level(doubles.CGC_Layer, norm=True, gate=()), one_list),
        "CGC of LibMTL": (lambda: level(doubles.CGC), one_tensor),
    }


@pytest.mark.parametrize("name", batch_norm_models())
def test_batch_norm_in_training(name: str) -> None:
    make, inputs = batch_norm_models()[name]
    assert_converts(make(), inputs)


@pytest.mark.parametrize("name", ["rechub MMOE", "deepctr PLE", "MMoE of TorchEasyRec"])
def test_gates_of_many_rows_are_one_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "JOINT_ROWS", 256)
    groups: list[list[int]] = []
    sharing = gates._sharing

    def recorded(*args: Any) -> list[list[int]]:
        groups.extend(sharing(*args))
        return sharing(*args)

    monkeypatch.setattr(gates, "_sharing", recorded)
    make, inputs = batch_norm_models()[name]
    assert_converts(make(), inputs)
    assert max(map(len, groups), default=0) > 1


def test_a_stream_that_one_gate_reads_has_no_gradient_without_it() -> None:
    """As without specific experts, where the tasks' streams are read by their gates alone."""
    level = rechub_ple(levels=2, tasks=2, specific=0, shared=3).cgc_layers[0].train()
    assert mk.convert(level).replaced
    x = [torch.randn(20, level.experts_shared[0].mlp[0].in_features, requires_grad=True) for _ in range(3)]
    found = torch.autograd.grad(level(x)[0].sum(), x, allow_unused=True)
    assert [gradient is None for gradient in found] == [False, True, False]


def test_without_specific_experts() -> None:
    assert not assert_converts(rechub_ple(tasks=2, specific=0), rechub_inputs).left_alone


def test_modules_are_mixed_where_rows_are_many(mixings: list[int]) -> None:
    model = rechub_ple(activation=Wobble)
    mk.convert(model)
    for rows, expected in ((255, []), (256, [8, 8])):
        mixings.clear()
        model(*rechub_inputs(rows, 0, torch.float32))
        assert mixings == expected  # see paying.MIXING_ROWS


def modules_only(model: Any) -> Any:
    """With activations that are not known, so that experts stay modules."""
    for mlp in model.modules():
        if isinstance(mlp, nn.Sequential):
            for i, module in enumerate(mlp):
                if type(module) is nn.ReLU:
                    mlp[i] = Wobble()
    return model


def test_modules_drop_by_the_same_random_numbers() -> None:
    """Experts' modules and gates draw in the library's order."""
    model = modules_only(rechub_ple(dropout=0.5))
    other = copy.deepcopy(model)
    mk.convert(other)
    found = []
    for m in (model, other):
        torch.manual_seed(5)
        found.append(m(*rechub_inputs(300, 0, torch.float32)))
    torch.testing.assert_close(found[1], found[0])


def test_dropout_behind_the_softmax(mixings: list[int]) -> None:
    """A gate's shares are dropped after the softmax, with the library's random numbers."""
    model = rechub_ple(levels=1)
    for gate in model.cgc_layers[0].gates_specific[:2]:
        gate.mlp[3] = nn.Dropout(0.5)
    other = copy.deepcopy(model)
    assert "; gate 1 with dropout 0.5 of its shares, mixed by itself in training" in str(mk.convert(other))
    mixings.clear()
    found = []
    for m, dtype in ((other, torch.float32), (copy.deepcopy(model).double(), torch.float64), (model, torch.float32)):
        torch.manual_seed(5)
        y = m(*rechub_inputs(100, 0, dtype))
        y.sum().backward()
        found.append([y, *(p.grad for p in m.cgc_layers.parameters())])
    assert_as_exact(*found)
    assert not mixings
    with torch.no_grad():
        torch.testing.assert_close(
            other.eval()(*rechub_inputs(9, 0, torch.float32)), model.eval()(*rechub_inputs(9, 0, torch.float32))
        )


def test_a_gate_without_a_layer_is_left_alone() -> None:
    model = rechub_ple(levels=1)
    model.cgc_layers[0].gates_specific[0] = nn.Sequential(nn.Softmax(dim=1))
    model.cgc_layers[0].gates_specific[1].mlp[2] = nn.Softmax(dim=0)
    (line,) = mk.convert(model).left_alone
    assert line.detail == "a gate without layers (gates_specific.0.0)"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_compiles(fresh_compiler: None) -> None:
    """Groups stay fused; a level whose experts are modules is left to the compiler."""
    for make, inputs, _, _ in (
        CASES["ExtractionNet with deeper specific experts"],
        CASES["rechub PLE with an activation of its own"],
    ):
        model = make().eval()
        mk.convert(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = inputs(300, 0, torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(tensors(compiled(*x)), tensors(model(*x)))
