"""What ``torch.manual_seed`` does, for the devices that are there."""

from __future__ import annotations

import torch


def seed(value: int) -> None:
    """Seeds the CPU's generator and those of GPUs.

    ``torch.manual_seed`` also keeps a stack trace for each kind of device that is absent, 2 ms a call in all: several
    times what a small test takes.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)
