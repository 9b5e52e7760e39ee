"""How calls of snr_aver are held against the formula."""

from __future__ import annotations

import mtlkernels as mk
from mtlkernels.testing import Case
from tests.ops import agreement
from tests.ops.snr_aver.definition import formula


def check(case: Case, backend: str, threads: int = 1) -> None:
    agreement.check(mk.snr_aver, formula, case, backend, threads)
