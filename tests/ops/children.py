"""Children of a fork, for which their parent waits so long and no longer."""

from __future__ import annotations

import os
import time

HANGS = 40.0  # seconds, on a machine that is busy with other things


def ended(pid: int) -> str:
    """How a child has ended, "" where all was well."""
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return f"ended with {code}" if code else ""
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "did not end"
