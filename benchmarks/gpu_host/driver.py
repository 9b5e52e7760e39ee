"""A driver for Triton that launches nothing, on tensors in the host's memory: what remains is the host's part.

Kernels are compiled for the architecture as they would be, and each launch goes as far as the driver. Not measured are
the driver's own time for a launch and for a copy from pinned memory, and PyTorch's allocator for GPUs, in whose place
is that for CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import mtlkernels as mk
from mtlkernels import _backends
from mtlkernels.ops._triton import Kind


class _Utilities:
    """Those of a driver: what is loaded is nothing, on a device like an H100."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, *_: Any) -> None:
        return None

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    """``launches`` counts what it was asked to launch; ``watch``, if there is one, is shown grids and arguments."""

    utils = _Utilities()

    def __init__(self, arch: int) -> None:
        self.launches = 0
        self.watch: Callable[[tuple[int, ...], tuple[Any, ...]], None] | None = None
        self._target = GPUTarget("cuda", arch, 32)

    def launcher_cls(self, *_: Any) -> Any:
        """What makes a compiled kernel's launches."""
        return self._launch

    def _launch(self, *call: Any) -> None:
        metadata, enter, leave = call[6:9]
        if enter is not None:
            enter(metadata)
        self.launches += 1
        if self.watch is not None:
            self.watch(call[:3], call[9:])
        if leave is not None:
            leave(metadata)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@functools.cache
def _driver(arch: int) -> Driver:
    """One for all: compiled kernels keep the launcher that they were first given."""
    return Driver(arch)


def _compiled(of: Callable[..., Kind], *args: Any) -> Kind:
    """The kind that kernels are compiled for, which is not that of the interpreter's."""
    return of(*args)._replace(upcast=False)


@contextmanager
def launching_nothing(arch: int = 90) -> Iterator[Driver]:
    """Within the block calls with tensors on the CPU go the way of a GPU's, as far as the driver."""
    found = _driver(arch)
    with ExitStack() as block:
        block.enter_context(mock.patch.object(driver, "_active", found))
        block.enter_context(mock.patch.object(_backends, "interpreting", lambda: True))
        block.enter_context(mock.patch.object(Kind, "of", staticmethod(functools.partial(_compiled, Kind.of))))
        block.enter_context(mk.use_backend("triton"))
        yield found
