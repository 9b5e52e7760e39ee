"""A rank that does not take part raises an error on the others, within the process group's timeout.

The last rank of each group first stays away from a call, then, in another group, ends.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import mtlkernels as mk

TIMEOUT = 4.0  # seconds
DIED = 7  # the exit code


def call(group: dist.ProcessGroup) -> None:
    mk.pcgrad([[torch.randn(1000)] for _ in range(3)], group=group)


def assert_raises_in_time(group: dist.ProcessGroup) -> None:
    start = time.monotonic()
    try:
        call(group)
    except RuntimeError:
        assert time.monotonic() - start < 10 * TIMEOUT
    else:
        raise AssertionError("no error")


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def check_absence() -> None:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    assert group is not None
    call(group)
    if not is_last():
        assert_raises_in_time(group)
    dist.barrier()  # of the group of all, which goes on


def check_death() -> None:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    assert group is not None
    call(group)
    if is_last():
        os._exit(DIED)
    assert_raises_in_time(group)
