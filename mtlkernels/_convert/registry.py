"""Which classes of which libraries can be converted, found by name, so that no library is imported for it."""

from __future__ import annotations

import importlib

from mtlkernels._convert.classes import Converter

# Class -> the module with its converter in ``CONVERTERS``. That module may import the library: it is there already.
_MODULES = {
    "deepctr_torch.models.multitask.ple.PLE": "mtlkernels._convert.deepctr",
    "deepctr_torch.models.multitask.mmoe.MMOE": "mtlkernels._convert.deepctr",
}


def find_converter(kind: type) -> Converter | None:
    """The converter for a class or the nearest of its bases."""
    for base in kind.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _MODULES:
            converter: Converter = importlib.import_module(_MODULES[name]).CONVERTERS[name]
            return converter
    return None


def known_names() -> list[str]:
    """The classes that can be converted."""
    return sorted(_MODULES)
