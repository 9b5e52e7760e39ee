"""A plugin of pytest that keeps a share of the tests: part ``SHARE_PART`` of ``SHARE_PARTS``.

Processes of pytest-xdist need not end by themselves, and only those that do write down what gcov has counted.
"""

from __future__ import annotations

import os
import zlib

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    parts, part = int(os.environ["SHARE_PARTS"]), int(os.environ["SHARE_PART"])
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part]
