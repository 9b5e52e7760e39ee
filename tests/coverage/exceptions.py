"""Branches that this machine's tests need not take: by file, the code of their line or a part of it, and why.

A line's branches are excepted wherever the code stands in the file.
"""

from __future__ import annotations

EXCEPTIONS: dict[str, dict[str, str]] = {}
