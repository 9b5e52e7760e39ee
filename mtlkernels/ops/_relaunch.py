"""Launches of Triton kernels that are made again, past what Triton's own way of launching looks up each time.

A compiled kernel launches through its ``run``, as PyTorch's compiler calls it: with grid, stream, handle, metadata and
hooks, and then all of the kernel's parameters. The stream is asked for once a call. Where somebody has hooks installed,
as a profiler has, the launches go Triton's way, which calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver


class Launches:
    """Those of a call in their order, with the table and ``passed``, the other tensors they take, replaced."""

    def __init__(self, made: Sequence[Any], passed: Sequence[Tensor]) -> None:
        numbers = {id(tensor): i for i, tensor in enumerate(passed)}
        self._interpreted = any(launch.compiled is None for launch in made)
        # Without arguments, which hold that call's memory.
        self._launches = [(launch._replace(args=()), *_arguments(launch, numbers)) for launch in made]

    def __call__(self, table: Tensor, passed: Sequence[Tensor]) -> None:
        stream, hooked = None, False
        if not self._interpreted:
            active: Any = driver.active
            stream = active.get_current_stream(active.get_current_device())
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            # None, a function, or a chain of some, which may be empty.
            hooked = bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
        for launch, arguments, places in self._launches:
            if places:
                arguments = list(arguments)
                for at, number in places:
                    arguments[at] = passed[number]
            compiled = launch.compiled
            if compiled is None:
                launch.kernel[(launch.programs,)](table, *arguments, **launch.constants)
            elif hooked:
                compiled[(launch.programs, 1, 1)](table, *arguments, stream=stream)
            else:
                handle = compiled.function, compiled.packed_metadata
                compiled.run(launch.programs, 1, 1, stream, *handle, None, None, None, table, *arguments)


def _arguments(launch: Any, numbers: dict[int, int]) -> tuple[list[Any], list[tuple[int, int]]]:
    """A launch's arguments behind the table, without tensors; where among them those go, and which."""
    arguments = launch.args[1:]
    if launch.compiled is not None:  # what is compiled takes all of the kernel's parameters in their order
        given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
        arguments = [given[name] for name in launch.kernel.arg_names][1:]
    places = [(at, numbers[id(each)]) for at, each in enumerate(arguments) if isinstance(each, Tensor)]
    return [None if isinstance(each, Tensor) else each for each in arguments], places
