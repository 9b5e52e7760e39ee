"""One rank: ``python -m tests.distributed.worker RANKS TIMEOUT FOLDER RANK MODULE...``."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def checks_of(module: str) -> list[str]:
    """The names of a module's checks, in their order."""
    return [name for name in vars(importlib.import_module(f"tests.distributed.{module}")) if name.startswith("check_")]


def main() -> None:
    ranks, timeout, folder, rank, *modules = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", int(ranks)),
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=float(timeout)),
    )
    outcomes: dict[str, str] = {}
    for module in modules:
        for name in checks_of(module):
            torch.manual_seed(0)
            try:
                getattr(importlib.import_module(f"tests.distributed.{module}"), name)()
                outcomes[f"{module}.{name}"] = ""
            except Exception:
                outcomes[f"{module}.{name}"] = traceback.format_exc()
            Path(folder, f"outcome{rank}").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
