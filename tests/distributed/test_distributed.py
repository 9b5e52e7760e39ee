"""PCGrad and converted models: 2 and 4 processes over gloo, each of which runs all checks of a module or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import requires
from tests.distributed import failure
from tests.distributed.processes import logs, run
from tests.distributed.worker import checks_of

pytestmark = requires.gloo
MODULES = ["data_parallel", "sharded", "optimizer", "weighting", "converted", "failure"]  # the last one ends a rank


@pytest.mark.parametrize("ranks", [2, 4])
def test_checks(ranks: int, tmp_path: Path) -> None:
    """One test, so that processes that share the suite do not each start the ranks."""
    found, codes = run(MODULES, ranks, tmp_path)
    assert codes == [0] * (ranks - 1) + [failure.DIED], logs(tmp_path)
    expected = {f"{module}.{name}": [""] * ranks for module in MODULES for name in checks_of(module)}
    expected["failure.check_death"][-1] = "did not run"  # to its end
    assert found.keys() == expected.keys()
    wrong = [
        f"{name}, rank {rank}: {text}"
        for name, texts in found.items()
        for rank, text in enumerate(texts)
        if text != expected[name][rank]
    ]
    assert not wrong, "\n".join(wrong)
