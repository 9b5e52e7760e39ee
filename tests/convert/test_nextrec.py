"""nextrec: on doubles of its modules, and on the library where it is installed, which pins old packages."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk
from tests.convert.agreement import assert_converts
from tests.convert.models import fill
from tests.convert.nextrec import MMOE, PLE, WIDTH, CGCLayer, named_as_the_library


@pytest.fixture
def library() -> Iterator[types.ModuleType]:
    """The doubles under the library's names."""
    with named_as_the_library() as found:
        yield found


def features(rows: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor]:
    return (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype),)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.LayerNorm])
def test_levels_of_ple(library: Any, norm: Any, fused_calls: list[int]) -> None:
    """The last shared gate, whose output nobody reads, keeps no gradient."""
    model = fill(PLE(norm))
    assert len(assert_converts(model, features, 150, serve=(1, 130)).replaced) == 2
    assert set(fused_calls) == {9}


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d])
def test_mmoe(library: Any, norm: Any) -> None:
    def named(rows: int, seed: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor]]:
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

    def inputs(rows: int, seed: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor]]:
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
