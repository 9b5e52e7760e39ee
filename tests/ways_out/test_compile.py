"""``torch.compile`` of several models of a kind: what it makes of one serves the others, as with plain PyTorch.

Where a model's own objects are part of what is guarded each model is compiled anew, and from the ninth on none is.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import mtlkernels as mk
from tests.convert import models
from tests.ways_out.kinds import MIXTURES, WIDTH, ByColumns, Kind, columns, rows

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # torch._dynamo makes an instance of each autograd.Function that it traces, and torch warns of that.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]
OPTIONS: Any = {"batch_norm": True, "dropout": 0.3}
KINDS = {
    "trunk": Kind(lambda: mk.nn.MMoE(WIDTH, 2, (5,), 2, gate_units=(4,), activation="dice", **OPTIONS), rows),
    "SNR": Kind(lambda: mk.nn.SNR(WIDTH, 2, (6, 5), (2, 2), activation="prelu", **OPTIONS), rows),
    "rechub MMOE": Kind(lambda: ByColumns(models.rechub_mmoe(tasks=2, experts=2, dims=(5,))), columns, convert=True),
    "expert_mixture": MIXTURES["expert_mixture with norms"],
}


@pytest.mark.parametrize(
    "name, training",
    [("trunk", False), ("trunk", True), ("SNR", True), ("rechub MMOE", False), ("expert_mixture", True)],
)
def test_models_of_a_kind_share_a_graph(name: str, training: bool) -> None:
    kind = KINDS[name]
    x = kind.inputs(9, 0)
    with torch.set_grad_enabled(training):
        compiled(kind.model(training))(*x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                compiled(kind.model(training))(*x)


def compiled(model: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="eager")


def test_a_norm_that_is_shared_has_a_graph_of_its_own() -> None:
    x = rows(9)[0]
    trunks: list[Any] = [mk.nn.MMoE(WIDTH, 2, (5,), num_experts=2, batch_norm=True) for _ in range(2)]
    trunks[0].level.experts[1] = trunks[0].level.experts[0]
    for model in trunks:
        other = copy.deepcopy(model)
        torch.testing.assert_close(compiled(model)(x), other(x))
        torch.testing.assert_close(list(model.buffers()), list(other.buffers()))
