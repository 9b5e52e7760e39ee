"""Compares instruction counts with the baseline: ``python -m benchmarks.guard [--update] [--keep DIR]``.

The exit status is 0 where no call takes more instructions than before, 1 where one does or the baseline does not know
it, and 2 where counts cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.guard import baseline, callgrind
from benchmarks.guard.baseline import Counts


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Instruction counts of small calls against the baseline.")
    p.add_argument("--update", action="store_true", help="keep these counts as the baseline")
    p.add_argument("--baseline", type=Path, default=baseline.FILE, metavar="FILE", help="another baseline")
    p.add_argument("--keep", type=Path, metavar="DIR", help="leave callgrind's files there, for callgrind_annotate")
    return p


def verdict(old: Counts, new: Counts) -> tuple[int, str]:
    """The exit status and what to print."""
    if other := baseline.differences(old, new):
        return 2, "\n".join(
            [
                "The baseline was counted with something else, so that counts say nothing about the code:",
                *(f"  {line}" for line in other),
                "Make a baseline of your own: check out what you compare with, build it, and run this with --update.",
            ]
        )
    found = baseline.changes(old, new)
    worse = [change for change in found if change.verdict in ("more", "new")]
    fewer = sum(change.verdict == "fewer" for change in found)
    summary = f"{len(found)} calls, {len(worse)} with more instructions or new, {fewer} with fewer"
    lines = [*map(str, found), summary]
    if any(change.verdict != "the same" for change in found):
        lines.append("If that is meant, run this with --update, and commit the baseline.")
    return int(bool(worse)), "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    print("counting instructions under valgrind, which takes a minute or more", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            counts = Counts(*callgrind.count(folder.resolve()))
        except callgrind.Unavailable as reason:
            print(reason, file=sys.stderr)
            return 2
    status, text = 0, f"{options.baseline}: {len(counts.calls)} calls"
    if options.baseline.exists():
        status, text = verdict(baseline.load(options.baseline), counts)
    elif not options.update:
        status, text = 2, f"there is no {options.baseline}: make it with --update"
    print(text)
    if options.update:
        baseline.save(counts, options.baseline)
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
