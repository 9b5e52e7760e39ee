"""Layerwise levels' kernels, as interpreted.py has the others."""

from __future__ import annotations

import pytest
import torch

from mtlkernels import use_backend
from mtlkernels._backends import interpreting, triton_implementation
from mtlkernels.ops.activations import CODES
from mtlkernels.ops.level import serving
from tests.ops.level import special_values
from tests.ops.level.special_values import Style
from tests.ops.level.test_serving_operator import KINDS, experts_and_rows
from tests.triton import norms

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")


# Norms and activations do not know of each other: here, where a call takes a second, each activation has one of them.
LEFT_OUT = {f"{('layer', 'batch')[i % 2]}_{name}" for i, name in enumerate(CODES)}
# Slopes of either activation travel alike.
LEFT_OUT |= {f"dice_{name}" for name in ("bf16", "strided", "no_rows", "one_channel", "everything_dropped")}
LEFT_OUT |= {f"prelu_{name}" for name in ("f16_odd", "mixed_dtypes", "one_row", "wide", "among_others")}


@pytest.mark.parametrize("name", [name for name in norms.cases() if name not in LEFT_OUT])
def test_layerwise(name: str) -> None:
    norms.check(name, "cpu")


@pytest.mark.parametrize("wanted", range(6))
def test_only_the_gradients_asked_for(wanted: int) -> None:
    """One kind's alone; with either activation by turns."""
    needs = tuple(kind == wanted for kind in range(6))
    norms.check_gradients_asked_for(needs, ("prelu", "dice")[wanted % 2], "cpu")


def test_running_statistics() -> None:
    norms.check_statistics("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_what_serves(kind: str) -> None:
    experts, x = experts_and_rows(kind, torch.float32, 20)
    args = experts.operands(*x)
    torch.testing.assert_close(triton_implementation("level", "serve")(*args), serving.serve(*args))


# A few of tests/ops/level/test_special_values.py's: each of their calls takes a second here. NumPy, which the
# interpreter computes with, warns of what is tested.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    "style", [Style("relu", linear_gates=True), Style("prelu"), Style("dice"), Style("relu", "layer")], ids=str
)
def test_special_values(style: Style) -> None:
    places = ("x", "upstream", "expert.0.weight")
    with use_backend("triton"):
        found = list(special_values.differences(style, torch.float32, ("nan",), (True,), places))
    assert not found, "\n".join(found[:10])
