"""Says whether a release's tag is its version: ``python -m release.tag v1.2.3`` fails where it is not.

It needs nothing but Python's own library, so that the release ends before anything is installed and compiled.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """The package's, read without importing it, since that takes PyTorch."""
    (found,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "mtlkernels" / "__init__.py").read_text(), re.MULTILINE)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m release.tag", description=__doc__.splitlines()[0])
    parser.add_argument("tag", help="as git has it: v1.2.3")
    tag = parser.parse_args(arguments).tag
    if tag != f"v{version()}":
        print(f"the tag must be v{version()}, as mtlkernels.__version__ is {version()}, got {tag}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
