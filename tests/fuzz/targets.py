"""What the fuzzer can call, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import convert_cases, level_cases, mixture_cases, pcgrad_cases, snr_cases


@dataclass(frozen=True)
class Target:
    """Random cases and what holds each against what it means."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], None]


TARGETS = {
    "expert_mixture": Target(level_cases.CASES, level_cases.check),
    "gated_mixture": Target(mixture_cases.CASES, mixture_cases.check),
    "snr_trans": Target(snr_cases.TRANS_CASES, snr_cases.check_trans),
    "snr_aver": Target(snr_cases.AVER_CASES, snr_cases.check_aver),
    "pcgrad": Target(pcgrad_cases.CASES, pcgrad_cases.check),
    "convert": Target(convert_cases.CASES, convert_cases.check),
}
