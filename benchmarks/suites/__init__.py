"""The suites by name. A new one is a file beside these that makes a ``Suite``, and a line here."""

from __future__ import annotations

from benchmarks.harness.case import Suite
from benchmarks.suites import mixture

SUITES: dict[str, Suite] = {suite.name: suite for suite in (mixture.SUITE,)}
