"""Calls on a GPU that were made before: what the host did for one is done again, with other inputs.

A launcher chooses tiles, lays out the call's table, allocates and launches. All of that follows from what is static
about the call and from its tensors' *signature*: dtypes, shapes, strides, devices, and how they are aligned. So the
launcher runs once; what it has done is recorded, and for the next call with that signature the recording allocates,
fills a table and launches what was compiled, by a few calls in C++ whatever the number of experts.

Parameters are *fixed*: their addresses are part of the signature, which each call takes anew, so that a parameter that
has moved, or has another shape, never meets an old recording. Inputs, outputs' gradients and what the forward pass
saved are *moving*: each call brings others. No recording is made of a call that does more than allocate and launch, as
one does that copies a strided parameter, nor of one whose moving tensors share memory with others, where an address
does not tell whose it is. Without the C++ extension there are none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mtlkernels import _extension, _torch
from mtlkernels.ops._table import Table, copied, on_device

# Of a level and a direction, kept: one for each number of rows, set of parameters, and so on.
_MAX_RECORDINGS = 32


class Recording:
    """What a call did, and how to do it again.

    Args:
        table: the call's, complete.
        moving: what the next call brings others of.
        returned: what the call returns, of what its table has allocated, and None.
        bases: for each of the table's entries what it is relative to, see csrc/recording.cpp.
        addresses: where the moving tensors and the rooms are.
    """

    def __init__(
        self,
        table: Table,
        moving: Sequence[Tensor],
        returned: Sequence[Tensor | None],
        bases: list[int],
        addresses: list[int],
    ) -> None:
        numbers = {id(tensor): i for i, tensor in enumerate(tensor for room in table.rooms for tensor in room)}
        entries = [
            entry - addresses[base - 1] if base else entry for entry, base in zip(table.entries, bases, strict=True)
        ]
        rooms = [(room[0].dtype, [tuple(tensor.shape) for tensor in room]) for room in table.rooms]
        make = _extension.function("Recording")
        places = [-1 if tensor is None else numbers[id(tensor)] for tensor in returned]
        self._prepare = make(entries, bases, rooms, places).prepare
        firsts = {id(room[0]): i for i, room in enumerate(table.rooms)}
        self._launches = [_again(launch, firsts) for launch in table.launches if launch is not None]

    def replay(self, moving: Sequence[Tensor]) -> list[Any]:
        """What the call returns for other tensors in the place of those that it was recorded with."""
        device = moving[0].device
        host, rooms, returned = self._prepare(moving)
        with on_device(device):
            entries = copied(host, device)
            for start, args, places in self._launches:
                if places:
                    args = list(args)
                    for at, room in places:
                        args[at] = rooms[room]
                start(entries, *args)
        found: list[Any] = returned
        return found


def _again(made: Any, rooms: dict[int, int]) -> tuple[Callable[..., Any], list[Any], list[tuple[int, int]]]:
    """What makes a launch again, its arguments behind the table, and where among them rooms go, and which."""
    if made.compiled is None:
        start = partial(made.kernel[(made.programs,)], **made.constants)
        args = list(made.args[1:])
    else:  # what is compiled takes all of the kernel's parameters in their order
        given = dict(zip(made.kernel.arg_names, made.args, strict=False)) | made.constants
        start = made.compiled[(made.programs, 1, 1)]
        args = [given[name] for name in made.kernel.arg_names][1:]
    places = [(at, rooms[id(arg)]) for at, arg in enumerate(args) if isinstance(arg, Tensor)]
    return start, [None if isinstance(arg, Tensor) else arg for arg in args], places


class Recordings:
    """Those of one kind of call, the one that was used last first."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, bytes, Recording]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, static: Any, signature: bytes) -> Recording | None:
        """That of a call with this signature, and the same of whatever else is ``static`` about it."""
        for i, entry in enumerate(self._kept):
            if entry[1] == signature and entry[0] == static:
                if i:
                    self._kept = [entry, *(other for other in self._kept if other is not entry)]
                return entry[2]
        return None

    def keep(
        self,
        static: Any,
        signature: bytes,
        table: Table,
        moving: Sequence[Tensor],
        fixed: Sequence[Tensor | None],
        returned: Sequence[Tensor | None],
    ) -> None:
        """Keeps what a call did, if it can be done again."""
        memory = [[tensor] for tensor in moving] + table.rooms
        allocated = {id(tensor) for room in table.rooms for tensor in room}
        if not (
            all(t.numel() for part in memory for t in part)
            and all(tensor is None or id(tensor) in allocated for tensor in returned)
        ):
            return
        spans = [(part[0].data_ptr(), _end(part[-1])) for part in memory]
        others = [(t.data_ptr(), _end(t)) for t in fixed if t is not None and t.numel()]
        order = sorted(range(len(spans)), key=lambda i: spans[i])
        starts = [spans[i][0] for i in order]

        def base(start: int, end: int) -> int:
            """The number of the span that has some of these bytes, from 1 on, or 0."""
            found = bisect_left(starts, end) - 1
            return order[found] + 1 if found >= 0 and spans[order[found]][1] > start else 0

        if any(spans[a][1] > spans[b][0] for a, b in zip(order, order[1:], strict=False)) or any(
            base(*span) for span in others
        ):
            return
        bases = [0] * len(table.entries)
        for place in table.addresses:
            bases[place] = base(table.entries[place], table.entries[place] + 1)
        recording = Recording(table, moving, returned, bases, [start for start, _ in spans])
        self._kept = [(static, signature, recording), *self._kept[: _MAX_RECORDINGS - 1]]


def _end(tensor: Tensor) -> int:
    """The address behind a tensor's last element."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size()


def signature(moving: Sequence[Tensor], fixed: Sequence[Tensor | None]) -> bytes | None:
    """The signature of a call's tensors; None where there can be no recording of it."""
    if not _extension.loaded() or _torch.dispatch_stack_length() > 0:
        return None
    found: bytes | None = _extension.function("signature")(moving, fixed)
    return found
