"""nextrec: on doubles of its modules, and on the library where it is installed, which pins old packages."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.agreement import assert_converts
from tests.convert.doubles import mixed, softmax_gate
from tests.convert.models import fill

WIDTH, TASKS = 10, 3


class MLP(nn.Module):
    """[Linear → (norm) → activation → Dropout] a layer."""

    def __init__(self, width: int, units: tuple[int, ...], norm: Any = None) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in zip([width, *units], units, strict=False):
            parts += [nn.Linear(a, b), *([] if norm is None else [norm(b)]), nn.ReLU(), nn.Dropout(0.0)]
        self.mlp = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)


class CGCLayer(nn.Module):
    """Shared experts first in a task's gate, last in the shared one, which the last level has too."""

    def __init__(
        self, width: int, units: tuple[int, ...], specific: int = 2, shared: int = 3, norm: Any = None
    ) -> None:
        super().__init__()
        self.shared_experts = nn.ModuleList(MLP(width, units, norm) for _ in range(shared))
        self.specific_experts = nn.ModuleList(
            nn.ModuleList(MLP(width, units, norm) for _ in range(specific)) for _ in range(TASKS)
        )
        self.task_gates = nn.ModuleList(softmax_gate(width, shared + specific) for _ in range(TASKS))
        self.shared_gate = softmax_gate(width, shared + TASKS * specific)
        self.nums_task = TASKS

    def forward(self, task_inputs: list[Tensor], shared_input: Tensor) -> tuple[list[Tensor], Tensor]:
        if len(task_inputs) != self.nums_task:
            raise ValueError(f"Expected {self.nums_task} task inputs")
        shared = [expert(shared_input) for expert in self.shared_experts]
        found, every = [], []
        for x, experts, gate in zip(task_inputs, self.specific_experts, self.task_gates, strict=True):
            own = [expert(x) for expert in experts]  # type: ignore[union-attr]
            found.append(mixed(gate(x), shared + own))
            every += own
        return found, mixed(self.shared_gate(shared_input), every + shared)


class MMOE(nn.Module):
    """The whole model, whose embedding is called by name."""

    def __init__(self, norm: Any = None) -> None:
        super().__init__()
        self.all_features = ["x"]
        self.embedding = Flat()
        self.experts = nn.ModuleList(MLP(WIDTH, (12, 7), norm) for _ in range(4))
        self.gates = nn.ModuleList(softmax_gate(WIDTH, 4) for _ in range(TASKS))
        self.towers = nn.ModuleList(nn.Linear(7, 1) for _ in range(TASKS))

    def forward(self, x: Any) -> Tensor:
        flat = self.embedding(x=x, features=self.all_features, squeeze_dim=True)
        hidden = [expert(flat) for expert in self.experts]
        return torch.cat([tower(mixed(g(flat), hidden)) for tower, g in zip(self.towers, self.gates, strict=True)], 1)


class Flat(nn.Module):
    def forward(self, x: Any, features: list[str], squeeze_dim: bool) -> Tensor:
        return torch.cat([x[name] for name in features], dim=1)


class PLE(nn.Module):
    """Two levels, the second one's shared output unused."""

    def __init__(self, norm: Any = None) -> None:
        super().__init__()
        self.cgc_layers = nn.ModuleList([CGCLayer(WIDTH, (12, 7), norm=norm), CGCLayer(7, (8,), norm=norm)])

    def forward(self, x: Tensor) -> Tensor:
        streams, shared = [x] * TASKS, x
        for layer in self.cgc_layers:
            streams, shared = layer(streams, shared)
        return torch.cat(streams, dim=1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The doubles under the library's names."""
    found = types.ModuleType("nextrec")
    found.__version__ = "0.6.14"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nextrec", found)
    monkeypatch.setattr(MLP, "__module__", "nextrec.basic.layers")
    monkeypatch.setattr(CGCLayer, "__module__", "nextrec.models.multitask.ple")
    monkeypatch.setattr(MMOE, "__module__", "nextrec.models.multitask.mmoe")
    return found


def features(rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype),)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.LayerNorm])
def test_levels_of_ple(library: Any, norm: Any, fused_calls: list[int]) -> None:
    """The last shared gate, whose output nobody reads, keeps no gradient."""
    model = fill(PLE(norm))
    assert len(assert_converts(model, features, 150, serve=(1, 130)).replaced) == 2
    assert set(fused_calls) == {9}


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d])
def test_mmoe(library: Any, norm: Any) -> None:
    def named(rows: int, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor]]:
        return ({"x": features(rows, seed, dtype)[0]},)

    (line,) = assert_converts(fill(MMOE(norm)), named, 150, serve=(1, 130)).replaced
    assert line.detail.endswith("and 3 gates in one expert_mixture")


def test_other_versions_are_left_alone(library: Any) -> None:
    library.__version__ = "0.7.0"
    for model in (MMOE(), CGCLayer(4, (3,))):
        (line,) = mk.convert(model).left_alone
        assert line.detail == "nextrec 0.7.0 is not known, 0.6.14 is"


def test_another_number_of_streams_is_the_librarys_error(library: Any) -> None:
    model = CGCLayer(WIDTH, (3,))
    assert mk.convert(model).replaced
    (x,) = features(4, 0, torch.float32)
    with pytest.raises(ValueError, match="Expected 3 task inputs"):
        model([x, x], x)


def test_the_library_itself() -> None:
    pytest.importorskip("nextrec")
    from nextrec.basic.features import DenseFeature, SparseFeature
    from nextrec.models.multitask import mmoe, ple

    def columns() -> dict[str, Any]:
        return {
            "dense_features": [DenseFeature(f"d{i}") for i in range(3)],
            "sparse_features": [SparseFeature(f"s{i}", vocab_size=11, embedding_dim=5) for i in range(3)],
            "tower_mlp_params_list": [{"hidden_dims": [5]}] * 3,
            "target": ["a", "b", "c"],
            "task": ["binary"] * 3,
        }

    def inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        found = {f"d{i}": torch.randn(rows, generator=generator).to(dtype) for i in range(3)}
        return (found | {f"s{i}": torch.randint(0, 11, (rows,), generator=generator) for i in range(3)},)

    for norm in ("none", "batch_norm", "layer_norm"):
        units = {"hidden_dims": [12, 7], "norm_type": norm}
        makers: tuple[Callable[[], Any], ...] = (
            lambda units=units: ple.PLE(
                shared_expert_mlp_params=units, specific_expert_mlp_params=[units] * 3, num_levels=2, **columns()
            ),
            lambda units=units: mmoe.MMOE(expert_mlp_params=units, num_experts=4, **columns()),
        )
        for make, count in zip(makers, (2, 1), strict=True):
            model = make()
            assert len(assert_converts(model, inputs).replaced) == count
            converted = copy.deepcopy(model)
            mk.convert(converted)
            other = pickle.loads(pickle.dumps(converted)).eval()
            x = inputs(4, 0, torch.float32)
            torch.testing.assert_close(other(*x), model.eval()(*x))
