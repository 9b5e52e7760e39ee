"""What the fuzzer can call, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Target:
    """Random cases and what holds each against what it means."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], None]


class _Targets(Mapping[str, Target]):
    """Imported when they are asked for: a process is after one, and those of ``convert`` take seconds."""

    def __init__(self, places: dict[str, tuple[str, str, str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Target:
        file, cases, check = self._places[name]
        module = importlib.import_module(f"tests.fuzz.{file}")
        return Target(getattr(module, cases), getattr(module, check))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


TARGETS = _Targets(
    {
        "expert_mixture": ("level_cases", "CASES", "check"),
        "gated_mixture": ("mixture_cases", "CASES", "check"),
        "snr_trans": ("snr_cases", "TRANS_CASES", "check_trans"),
        "snr_aver": ("snr_cases", "AVER_CASES", "check_aver"),
        "pcgrad": ("pcgrad_cases", "CASES", "check"),
        "convert": ("convert_cases", "CASES", "check"),
    }
)
