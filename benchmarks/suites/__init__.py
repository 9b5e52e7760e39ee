"""The suites by name. A new one is a file beside these that makes a ``SUITE`` or a ``STUDY``, and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

from benchmarks.harness.case import Study, Suite

T = TypeVar("T", Suite, Study)


class _ByName(Mapping[str, T]):
    """Each from the module that its name gives, imported when it is asked for.

    Some want packages that the others do without, which a machine with a GPU may not have.
    """

    def __init__(self, attribute: str, *names: str) -> None:
        self._attribute, self._names = attribute, names

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        found: T = getattr(module, self._attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


SUITES: Mapping[str, Suite] = _ByName("SUITE", "mixture", "convert", "pcgrad", "pcgrad-step", "snr")
STUDIES: Mapping[str, Study] = _ByName("STUDY", "pcgrad-ablation", "pcgrad-rarely", "snr-study", "gpu-host", "serving")
