"""PCGrad and converted models: 2 and 4 processes over gloo, each of which runs all checks of a module or two."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import failure
from tests.distributed.processes import Outcomes, logs, run
from tests.distributed.worker import checks_of

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="gloo is not built in"
)
MODULES = ["data_parallel", "sharded", "optimizer", "converted", "failure"]  # the last one ends a rank
NAMES = [f"{module}.{name}" for module in MODULES for name in checks_of(module)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    found = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found[ranks], codes = run(MODULES, ranks, folder)
        assert codes == [0] * (ranks - 1) + [failure.DIED], logs(folder)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_check(name: str, ranks: int, outcomes: dict[int, Outcomes]) -> None:
    found = outcomes[ranks][name]
    expected = [""] * ranks
    if name == "failure.check_death":
        expected[-1] = "did not run"  # to its end
    assert found == expected, "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
