"""PCGrad and converted models: 2 and 4 processes over gloo, each of which runs all checks of a module or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import requires
from tests.distributed import failure
from tests.distributed.processes import logs, run
from tests.distributed.worker import checks_of

pytestmark = requires.gloo
# The last one ends a rank. What is built on the collectives does not see how many ranks there are.
MODULES: dict[int, list[str]] = {
    2: ["data_parallel", "sharded", "optimizer", "weighting", "tensor_parallel", "converted", "failure"],
    4: ["data_parallel", "sharded", "failure"],
}


@pytest.mark.parametrize("ranks", MODULES)
def test_checks(ranks: int, tmp_path: Path) -> None:
    """One test, so that processes that share the suite do not each start the ranks."""
    found, codes = run(MODULES[ranks], ranks, tmp_path)
    assert codes == [0] * (ranks - 1) + [failure.DIED], logs(tmp_path)
    expected = {f"{module}.{name}": [""] * ranks for module in MODULES[ranks] for name in checks_of(module)}
    expected["failure.check_death"][-1] = "did not run"  # to its end
    assert found.keys() == expected.keys()
    wrong = [
        f"{name}, rank {rank}: {text}"
        for name, texts in found.items()
        for rank, text in enumerate(texts)
        if text != expected[name][rank]
    ]
    assert not wrong, "\n".join(wrong)
