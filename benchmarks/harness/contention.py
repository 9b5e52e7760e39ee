"""Whether something else kept the processors busy while contenders were timed.

Another busy process beside two threads that wait for each other slows calls 5 to 40 times, and not everybody alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

# Of a core; more than what a quiet system does for itself.
TOLERATED = 0.2
_STAT = Path("/proc/stat")


class Others:
    """Counts, from when it is made, what other processes take of all cores; ``own`` are children that do not count."""

    def __init__(self, own: Sequence[int] = ()) -> None:
        self._own = own
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        """The time, and the seconds of all cores that were not idle, of all processes and of ours."""
        if not _STAT.exists():
            return time.perf_counter(), 0.0, 0.0
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, interrupts, soft, steal = map(int, _STAT.read_text().split("\n")[0].split()[1:9])
        mine = sum(os.times()[:4]) + sum(_seconds(pid) for pid in self._own)
        return time.perf_counter(), (user + nice + system + interrupts + soft + steal) / tick, mine

    def cores(self) -> float:
        """How many cores they took on average; 0 where that is not known."""
        (start, busy, mine), (end, busy_now, mine_now) = self._start, self._now()
        return max(0.0, (busy_now - busy) - (mine_now - mine)) / max(end - start, 1e-9)


def _seconds(pid: int) -> float:
    """What a process has taken of the cores."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
