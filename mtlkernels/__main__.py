"""``python -m mtlkernels``: what an install is made of, and whether it computes what it should; failed calls again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mtlkernels",
        usage="%(prog)s [-h] [replay FILE]",
        description="Without arguments: prints what mtlkernels.show_config() says of this install, then calls every op"
        " with small random arguments, in every dtype and by every implementation that is here, and compares outputs"
        " and gradients with float64. Takes seconds. Exit status: 0 where all are right, otherwise 1.",
    )
    commands = parser.add_subparsers(prog=parser.prog, dest="command", metavar="COMMAND")
    replay = commands.add_parser(
        "replay",
        help="run a call again that failed while the environment variable MTLKERNELS_DUMP named a folder",
        description="Runs a saved call by its implementation and by the reference, and prints whether it fails again or"
        " how far the results are apart. Exit status: 0 where it does not fail, 1 where it does, 2 where it cannot be"
        " run.",
    )
    replay.add_argument("file", type=Path, metavar="FILE", help="as the error's message names it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(argv)
    import mtlkernels

    if options.command == "replay":
        from mtlkernels import _replay

        return _replay.run(options.file, sys.stdout)
    from mtlkernels import _selfcheck

    print(mtlkernels.show_config(), end="\n\n", flush=True)
    return _selfcheck.run(sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
