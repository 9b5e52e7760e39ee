"""Watches what interpreted launches touch, and finds what a GPU would punish without saying so.

Bounds: every address that is loaded from, stored to or counted at lies in the memory of a tensor that is alive when the
launch begins, and is a multiple of what is read there. Races: no two programs store to one address, and none loads what
another one stores unless a counter stands between them, which the other has moved after it stored and this one before
it loads.
"""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from mtlkernels import _torch
from mtlkernels.ops._table import Table

LISTED = 3  # findings of a launch that its error names


class Access(NamedTuple):
    """One load or store: who, when (the number of the access in its launch), and where."""

    program: int
    time: int
    addresses: Any


class Memory:
    """Where live tensors are: sorted, disjoint runs of bytes, each known by its first."""

    def __init__(self, runs: Iterable[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for start, size in sorted(runs):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], start + size))
            else:
                merged.append((start, start + size))
        self.starts, self.ends = [start for start, _ in merged], [end for _, end in merged]

    def run_of(self, low: int, high: int) -> int | None:
        """The run that holds the bytes [low, high); None where none does."""
        i = bisect_right(self.starts, low) - 1
        return self.starts[i] if i >= 0 and high <= self.ends[i] else None

    def outside(self, addresses: Any, size: int) -> int:
        """How many of the addresses have not all of their ``size`` bytes in one run."""
        return sum(self.run_of(address, address + size) is None for address in addresses.tolist())


def runs_of(objects: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The storages of CPU tensors among objects: first byte and length."""
    for value in objects:
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and not _torch.is_legacy_batched_tensor(value)
        if plain and value.is_cpu and value.layout is torch.strided and not value._is_zerotensor():
            storage = value.untyped_storage()
            if storage.nbytes():
                yield storage.data_ptr(), storage.nbytes()


class Known:
    """The tensors that tables have been told of, which nearly all accesses go to; others take a walk to be found."""

    def __init__(self) -> None:
        gc.unfreeze()
        self.for_good = list(runs_of(gc.get_objects()))  # what the walk leaves out once it is frozen
        gc.freeze()
        self.told: list[weakref.ref[torch.Tensor]] = []

    def tell(self, tensors: Iterable[torch.Tensor | None]) -> None:
        self.told += [weakref.ref(tensor) for tensor in tensors if tensor is not None]

    def alive(self, arguments: Iterable[Any]) -> Memory:
        """Those of them that are alive, and what a launch is given."""
        found = [tensor for ref in self.told if (tensor := ref()) is not None]
        self.told = [weakref.ref(tensor) for tensor in found]
        return Memory(runs_of([*found, *arguments]))

    def walk(self) -> Memory:
        """All live tensors."""
        return Memory([*self.for_good, *runs_of(gc.get_objects())])


@dataclass
class Launch:
    """What the programs of one launch have touched so far."""

    kernel: str
    memory: Memory
    walk: Callable[[], Memory]  # finds all memory, where what is known first does not do
    program: int = -1
    time: int = 0
    walked: bool = False
    loads: list[tuple[Access, set[int]]] = field(default_factory=list)  # with the runs that they are in
    stores: list[Access] = field(default_factory=list)
    stored_runs: set[int] = field(default_factory=set)
    counts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # when a program moved a counter, and which
    findings: list[str] = field(default_factory=list)

    def touch(self, what: str, pointers: Any, mask: Any) -> None:
        """An access of the current program."""
        chosen = pointers.data[mask.data.astype(bool)] if mask is not None else pointers.data.ravel()
        self.time += 1
        if not chosen.size:
            return
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        low, high = int(chosen.min()), int(chosen.max()) + size
        run = self.memory.run_of(low, high)
        if run is None and not self.walked:
            self.memory, self.walked = self.walk(), True
            run = self.memory.run_of(low, high)
        runs = {run} if run is not None else self._runs(what, chosen, size)
        access = Access(self.program, self.time, chosen)
        if (chosen % size).any():
            self._end(f"program {self.program} {what} at addresses that are no multiples of {size}")
        if what == "counts":
            moved = self.counts.setdefault(self.program, [])
            moved += [(self.time, address) for address in chosen.tolist()]
        elif what == "loads":
            self.loads.append((access, runs))
        else:
            self.stores.append(access)
            self.stored_runs |= runs

    def _runs(self, what: str, chosen: Any, size: int) -> set[int]:
        """Of an access that is not within one run; ends the launch where some of it is in none."""
        outside = self.memory.outside(chosen, size)
        if outside:
            self._end(f"program {self.program} {what} outside of every tensor, at {outside} addresses")
        found = (self.memory.run_of(a, a + size) for a in chosen.tolist())
        return {run for run in found if run is not None}

    def _end(self, finding: str) -> None:
        """Such an access may end the process, or harm it."""
        self.findings.append(finding)
        raise IndexError(finding)

    def finish(self) -> list[str]:
        """All findings, races among them."""
        if self.program > 0 and self.stores:
            self._races()
        return self.findings

    def _races(self) -> None:
        addresses = np.concatenate([store.addresses for store in self.stores])
        each = [len(store.addresses) for store in self.stores]
        programs, times = (np.repeat([store[i] for store in self.stores], each) for i in range(2))
        order = np.argsort(addresses, kind="stable")
        addresses, programs, times = addresses[order], programs[order], times[order]
        twice = (addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])
        if twice.any():
            at = int(twice.argmax())
            self.findings.append(
                f"programs {programs[at]} and {programs[at + 1]} store to one address, of {twice.sum()} such"
            )
        for load, runs in self.loads:
            if not runs & self.stored_runs:
                continue
            place = np.searchsorted(addresses, load.addresses)
            place[place == len(addresses)] = 0
            others = (addresses[place] == load.addresses) & (programs[place] != load.program)
            writers = set(zip(programs[place[others]].tolist(), times[place[others]].tolist(), strict=True))
            for writer, time in writers:
                if not self._ordered(writer, time, load):
                    self.findings.append(
                        f"program {load.program} loads what program {writer} stores, without a counter between them"
                    )

    def _ordered(self, writer: int, stored: int, load: Access) -> bool:
        """Whether the writer moved a counter after its store, and the reader that one later, before its load."""
        first: dict[int, int] = {}
        for time, counter in self.counts.get(writer, ()):
            if time > stored:
                first.setdefault(counter, time)
        own = self.counts.get(load.program, ())
        return any(counter in first and first[counter] < time < load.time for time, counter in own)


@contextmanager
def checked() -> Iterator[None]:
    """Every launch in the block is checked when it has ended.

    Raises:
        AssertionError: out of a launch that has findings.
    """
    known = Known()
    builder = interpreter.InterpreterBuilder
    call, index = interpreter.GridExecutor.__call__, builder.set_grid_idx
    load, store, count = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    point, cut = Table.pointers, Table.slices
    current: list[Launch] = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        own = Launch(self.fn.__name__, known.alive((*args, *kwargs.values())), known.walk)
        current.append(own)
        try:
            call(self, *args, **kwargs)
        except interpreter.InterpreterError:
            if not own.findings:
                raise
        finally:
            current.pop()
        if findings := own.finish():
            more = f" and {len(findings) - LISTED} more" if len(findings) > LISTED else ""
            raise AssertionError(f"{own.kernel}: {'; '.join(findings[:LISTED])}{more}")

    def next_program(self: Any, *at: int) -> None:
        current[-1].program += 1
        index(self, *at)

    def loads(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        current[-1].touch("loads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def stores(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].touch("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counts(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].touch("counts", pointers, mask)
        return count(self, operation, pointers, value, mask, *rest)

    def pointers(self: Any, tensors: Iterable[torch.Tensor | None]) -> int:
        listed = list(tensors)
        known.tell(listed)
        return point(self, listed)

    def slices(self: Any, tensor: torch.Tensor | None, numbers: Iterable[int]) -> int:
        known.tell([tensor])
        return cut(self, tensor, numbers)

    with ExitStack() as patches:
        for of, name, new in (
            (Table, "pointers", pointers),
            (Table, "slices", slices),
            (interpreter.GridExecutor, "__call__", launch),
            (builder, "set_grid_idx", next_program),
            (builder, "create_masked_load", loads),
            (builder, "create_masked_store", stores),
            (builder, "create_atomic_rmw", counts),
        ):
            patches.enter_context(mock.patch.object(of, name, new))
        yield
