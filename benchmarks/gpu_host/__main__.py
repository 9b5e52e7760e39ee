"""The host's time for calls on a GPU: ``python -m benchmarks.gpu_host [--experts 6 63] [--rows 64] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.gpu_host import calls


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The host's part of calls on a GPU, by a driver that launches nothing."
    )
    parser.add_argument("--experts", nargs="+", type=int, default=calls.EXPERTS, metavar="E")
    parser.add_argument("--rows", type=int, default=calls.ROWS, metavar="B")
    parser.add_argument("--calls", type=int, default=calls.CALLS, metavar="N", help="how many are timed of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    found = [calls.measure(experts, options.rows, options.calls) for experts in options.experts]
    print(calls.table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
