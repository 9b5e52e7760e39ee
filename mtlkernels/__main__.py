"""``python -m mtlkernels``: what an install is made of, and whether it computes what it should."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mtlkernels",
        description="Without arguments: prints what mtlkernels.show_config() says of this install, then calls every op"
        " with small random arguments, by every implementation and in every dtype that this machine has, and compares"
        " outputs and gradients with float64. Takes seconds. Exit status: 0 where all are right, otherwise 1.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    _parser().parse_args(argv)
    import mtlkernels
    from mtlkernels import _selfcheck

    print(mtlkernels.show_config(), end="\n\n", flush=True)
    return _selfcheck.run(sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
