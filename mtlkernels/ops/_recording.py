"""Calls on a GPU that were made before: what the host did for one is done again, with other inputs.

A launcher chooses tiles, lays out the call's table, allocates and launches. All of that follows from what is static
about the call and from its tensors' *signature*: dtypes, shapes, strides, devices, and how they are aligned. So the
launcher runs once; what it has done is recorded, and for the next call with that signature the recording allocates,
fills a table and launches what was compiled, by a few calls in C++ whatever the number of experts.

Parameters are *fixed*: their addresses are part of the signature, which each call takes anew, so that a parameter that
has moved, or has another shape, never meets an old recording. Inputs, outputs' gradients and what the forward pass
saved are *moving*: each call brings others. No recording is made of a call that does more than allocate and launch, as
one does that copies a strided parameter. Nothing is recorded of a signature that is seen for the first time: where
parameters are made anew for each call, as folded norms are, that is all that there will be; what could not be recorded
the second time is not tried again. Without the C++ extension there are no recordings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from mtlkernels import _extension, _torch
from mtlkernels.ops._relaunch import Launches
from mtlkernels.ops._table import Table, copied, on_device

# Of a level's structure and a direction, kept: one for each number of rows, set of parameters, and so on, of all levels
# with that structure; and signatures that were seen once, or recorded.
_MAX_RECORDINGS, _MAX_SEEN = 1024, 1024


Finish = Callable[[list[Any]], None]
Value = TypeVar("Value")


class Recording:
    """What a call did, and how to do it again.

    Args:
        table: the call's, complete.
        returned: what the call returns, of what its table has allocated, and None.
        bases: for each of the table's entries what it is relative to, see csrc/recording.cpp.
        addresses: where the moving tensors and the rooms are.
        finish: what is done with what is returned, if anything, once all is launched.
    """

    def __init__(
        self,
        table: Table,
        returned: Sequence[Tensor | None],
        bases: list[int],
        addresses: list[int],
        finish: Finish | None,
    ) -> None:
        self._finish = finish
        numbers = {id(tensor): i for i, tensor in enumerate(tensor for room in table.rooms for tensor in room)}
        entries = [
            entry - addresses[base - 1] if base else entry for entry, base in zip(table.entries, bases, strict=True)
        ]
        rooms = [(room[0].dtype, [tuple(tensor.shape) for tensor in room]) for room in table.rooms]
        make = _extension.function("Recording")
        places = [-1 if tensor is None else numbers[id(tensor)] for tensor in returned]
        launches = [launch for launch in table.launches if launch is not None]
        taken = {id(arg) for launch in launches for arg in launch.args[1:] if isinstance(arg, Tensor)}
        passed = [i for i, room in enumerate(table.rooms) if id(room[0]) in taken]
        self._prepare = make(entries, bases, rooms, passed, places).prepare
        self._launch = Launches(launches, [table.rooms[i][0] for i in passed])

    def replay(self, moving: Sequence[Tensor]) -> Any:
        """What the call returns, as ``_C.Results``, for other tensors in the place of those of the recorded one."""
        device = moving[0].device
        host, passed, memory, results = self._prepare(moving)
        with on_device(device):
            self._launch(copied(host, device), passed)
        del memory  # which kernels find through the table
        if self._finish is not None:
            self._finish(results.list())
        return results


class Recordings:
    """Those of one kind of call. The last one found is compared first: to find another takes its signature's hash."""

    def __init__(self) -> None:
        self._last: tuple[Any, bytes, Recording] | None = None
        self._kept = _Latest[Recording]()
        self._seen = _Latest[None]()
        self._tried = _Latest[None]()

    def find(self, static: Any, signature: bytes) -> Recording | None:
        """That of a call with this signature, and the same of whatever else is ``static`` about it."""
        last = self._last
        if last is not None and last[1] == signature and last[0] == static:
            return last[2]
        call = (static, signature)
        found = self._kept.get(call)
        if found is not None:
            self._kept.put(call, found, _MAX_RECORDINGS)
            self._last = (*call, found)
        return found

    def wants(self, static: Any, signature: bytes) -> bool:
        """Whether this call is to be recorded: the second of its kind that comes here."""
        call = (static, signature)
        if call in self._tried:
            return False
        short = hash(call)  # two calls that share it cost no more than a recording that is not used
        if short not in self._seen:
            self._seen.put(short, None, _MAX_SEEN)
            return False
        self._seen.pop(short, None)
        self._tried.put(call, None, _MAX_SEEN)
        return True

    def keep(
        self,
        static: Any,
        signature: bytes,
        table: Table,
        moving: Sequence[Tensor],
        fixed: Sequence[Tensor | None],
        returned: Sequence[Tensor | None],
        finish: Finish | None = None,
    ) -> None:
        """Keeps what a call did, if it can be done again."""
        origins = _Origins(table, moving, fixed)
        allocated = {id(tensor) for room in table.rooms for tensor in room}
        bases = [0] * len(table.entries)
        for place, tensor in table.addresses:
            found = origins.find(table.entries[place], tensor)
            if found is None:
                return
            bases[place] = found
        if all(tensor is None or id(tensor) in allocated for tensor in returned):
            recording = Recording(table, returned, bases, [start for start, _ in origins.spans], finish)
            self._kept.put((static, signature), recording, _MAX_RECORDINGS)
            self._tried.pop((static, signature), None)  # one that has to go may be recorded again


class _Latest(OrderedDict[Any, Value]):
    """What was put last is at its end; the rest goes. Each step by itself is safe where several threads call."""

    def put(self, key: Any, value: Value, most: int) -> None:
        self[key] = value
        with suppress(KeyError):  # another thread's has pushed it out
            self.move_to_end(key)
            while len(self) > most:
                self.popitem(last=False)


class _Origins:
    """Whose an address in a table is: of which moving tensor, or of which room."""

    def __init__(self, table: Table, moving: Sequence[Tensor], fixed: Sequence[Tensor | None]) -> None:
        memory = [[tensor] for tensor in moving] + table.rooms
        self.spans = [(part[0].data_ptr(), _end(part[-1])) for part in memory]
        apart = [part for part in memory[len(moving) :] if len(part) > 1]
        self._empty = not all(t.numel() for part in (moving, *apart) for t in part)
        self._known: dict[int, list[int]] = {}
        for base, tensor in (*((0, t) for t in fixed if t is not None), *enumerate(moving, 1)):
            self._known.setdefault(id(tensor), []).append(base)

    def find(self, address: int, tensor: Tensor | None) -> int | None:
        """0 where the address stays, otherwise the number of what it is in, from 1 on; None where that is not known.

        A parameter or a moving tensor is known as the object that it is, see :func:`apart`; what is made of one, as a
        part of a saved tensor is, by the only memory that has the address. Nobody knows a copy.
        """
        if address == 0:
            return 0
        found = self._known.get(id(tensor))
        if found is None:
            found = [i for i, (start, end) in enumerate(self.spans, 1) if start <= address < end]
        return None if self._empty or len(found) != 1 else found[0]


def apart(tensors: Sequence[Any]) -> list[Any]:
    """The tensors, each an object of its own: of one that comes again, as an input for two streams may, an alias."""
    met: set[int] = set()
    found = []
    for tensor in tensors:
        found.append(tensor.view_as(tensor) if tensor is not None and id(tensor) in met else tensor)
        met.add(id(tensor))
    return found


def _end(tensor: Tensor) -> int:
    """The address behind a tensor's last element."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size()


def signature(moving: Sequence[Tensor], fixed: Sequence[Tensor | None]) -> bytes | None:
    """The signature of a call's tensors; None where there can be no recording of it."""
    if not _extension.has_module() or _torch.dispatch_stack_length() > 0:
        return None
    found: bytes | None = _extension.function("signature")(moving, fixed)
    return found
