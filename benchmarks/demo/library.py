"""deepctr-torch, imported without its side effect."""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from unittest import mock


def import_deepctr() -> ModuleType:
    """Imports deepctr-torch.

    On import it starts a thread that asks PyPI for its newest version, and prints a line where there is no network.
    Nobody here needs either, so that threads do not start while it is imported; what it needs itself is imported first.
    """
    for name in ("requests", "sklearn.metrics", "torch.utils.data", "tqdm"):
        importlib.import_module(name)
    with mock.patch.object(threading.Thread, "start"):
        return importlib.import_module("deepctr_torch")
