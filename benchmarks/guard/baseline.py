"""The counts that are kept, and what has changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("baseline.json")
# Counts of the same code differ by less than this from run to run, as a share.
TOLERANCE = 0.005


@dataclass(frozen=True)
class Counts:
    """Instructions of each call, and what they depend on beside the code."""

    calls: Mapping[str, float]
    settings: Mapping[str, str]


def load(path: Path = FILE) -> Counts:
    return Counts(**json.loads(path.read_text()))


def save(counts: Counts, path: Path = FILE) -> None:
    calls = {name: round(count) for name, count in counts.calls.items()}
    path.write_text(json.dumps({"settings": dict(counts.settings), "calls": calls}, indent=1) + "\n")


@dataclass(frozen=True)
class Change:
    """A call that both have counted, or one of them."""

    name: str
    before: float | None
    after: float | None

    @property
    def share(self) -> float | None:
        """By how much the count has grown."""
        return None if self.before is None or self.after is None else self.after / self.before - 1

    @property
    def verdict(self) -> str:
        if self.share is None:
            return "new" if self.before is None else "gone"
        if abs(self.share) <= TOLERANCE:
            return "the same"
        return "more" if self.share > 0 else "fewer"

    def __str__(self) -> str:
        counts = " -> ".join("none" if count is None else f"{count:,.0f}" for count in (self.before, self.after))
        return f"{self.verdict:>8}  {self.name}: {counts}" + ("" if self.share is None else f" ({self.share:+.2%})")


def differences(old: Counts, new: Counts) -> list[str]:
    """What the counts depend on and is not the same; then they cannot be compared."""
    return [
        f"{name}: {old.settings.get(name, 'unknown')} there, {new.settings.get(name, 'unknown')} here"
        for name in {**old.settings, **new.settings}
        if old.settings.get(name) != new.settings.get(name)
    ]


def changes(old: Counts, new: Counts) -> list[Change]:
    """A change a call, in the order of the new counts."""
    names = {**new.calls, **old.calls}
    return [Change(name, old.calls.get(name), new.calls.get(name)) for name in names]
