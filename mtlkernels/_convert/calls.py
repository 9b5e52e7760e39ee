"""What is kept of the calls of an instance of a converted class, from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from mtlkernels import _extension, _tracing
from mtlkernels._convert.arguments import Absent
from mtlkernels._convert.paying import TooFewRows, in_trial
from mtlkernels._convert.values import What
from mtlkernels._convert.watched import Watched, changed
from mtlkernels.ops.level.kept import KeptCalls, Patience

Read = TypeVar("Read")

# As csrc/watch.cpp has them.
_WORDS = Absent, What, What.OBJECT, What.ITSELF, What.WITH, What.ITEMS, What.ENTRIES
# Of an instance: what is kept of its calls.
CALLS = "_mtlkernels_calls"


class CallsOfLevels:
    """``too_few`` are the calls that its own code took as they had few rows."""

    def __init__(self) -> None:
        self._by_number: dict[int, KeptCalls] = {}
        self._readings: dict[int, Readings] = {}
        self.seen = Seen()
        self.too_few = TooFewRows()

    def __reduce__(self) -> Any:
        """A copy of the instance keeps nothing of it."""
        return CallsOfLevels, ()

    def of(self, number: int) -> KeptCalls:
        """The calls that serve of one level."""
        return self._by_number.get(number) or self._by_number.setdefault(number, KeptCalls())

    def readings(self, number: int) -> Readings:
        """What was read of one level."""
        return self._readings.get(number) or self._readings.setdefault(number, Readings())


def calls_of(module: Any) -> CallsOfLevels:
    """What is kept of a module's calls."""
    calls: CallsOfLevels | None = module.__dict__.get(CALLS)
    if calls is None:
        calls = module.__dict__[CALLS] = CallsOfLevels()
    return calls


def may_be_kept() -> bool:
    """Whether nothing looks on: neither a trial, which reads all anew, nor the compiler or a tracer."""
    return _extension.has_module() and not in_trial() and not _tracing.observed()


class Readings:
    """What was read of a level, for calls that find the same modules, tensors and settings there.

    Reading a dozen experts in Python takes several times as long as one row does, and comparing what they hold, in C++,
    a tenth of it. Modules and tensors are held until a call finds others.
    """

    _MOST = 16

    def __init__(self) -> None:
        self._places: dict[Hashable, _Place] = {}

    def find(
        self,
        key: Hashable,
        roots: Callable[[], Any],
        read: Callable[[], Read | str],
        holds: Callable[[Read], Iterable[Any]],
    ) -> Read | str:
        """What ``read`` gives, or has given where ``roots`` were the same; a reason, which is a string, is not kept.

        ``key`` is all else that it depends on. Nothing is kept that ``holds`` other modules and tensors than the roots
        do, as views of theirs, or what another thread has put there meanwhile.
        """
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= self._MOST:
                self._places.clear()
            place = self._places[key] = _Place()
        kept = place.kept
        if kept is not None:
            if kept.snapshot.is_of(roots()):
                place.patience.served += 1
                return kept.found  # type: ignore[no-any-return]
            for other in list(self._places.values()):
                other.kept = None  # which may hold what was exchanged
            place.patience.changed()
        elif place.patience.is_over():
            now = roots()
            taken = None if now is None else _extension.function("snapshot")(now, nn.Module)
            found = read()
            if taken is not None and not isinstance(found, str):
                snapshot, beside = taken
                place.kept = _Kept(snapshot, beside, found) if all(map(snapshot.has, holds(found))) else None
            place.patience.tried(place.kept is not None)
            return self._only(found, holds)
        place.patience.waited += 1
        return self._only(read(), holds)

    def _only(self, found: Read | str, holds: Callable[[Read], Iterable[Any]]) -> Read | str:
        """``found``; what was read for calls of other kinds goes where it holds what is not there any more.

        Of a reason that cannot be told, and all goes.
        """
        kept = [place for place in list(self._places.values()) if place.kept is not None]
        now = set(map(id, holds(found))) if kept and not isinstance(found, str) else set()
        for place in kept:
            if place.kept is not None and not now.issuperset(map(id, holds(place.kept.found))):
                place.kept = None
        return found


class _Kept(NamedTuple):
    """``beside`` is what the snapshot looks at, which has to live as long."""

    snapshot: Any
    beside: Any
    found: Any


class _Place:
    def __init__(self) -> None:
        self.kept: _Kept | None = None
        self.patience = Patience()


class Seen:
    """What is watched of an instance, as long as it is found to be the same objects, which C++ compares."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Any, Any, Any] | None = None
        self._patience = Patience()

    def changed(self, module: Any, watched: Watched) -> str | None:
        """:func:`watched.changed`."""
        kept = self._kept
        if kept is not None:
            watch, rest, _, entries = kept
            if entries is watched and watch.still(module):
                self._patience.served += 1
                return changed(module, rest) if rest else None
            self._kept = None
            self._patience.changed()
        elif self._patience.is_over() and may_be_kept():
            taken = _extension.function("watch")(module, watched, _WORDS)  # with what it looks at, beside
            other = changed(module, watched)  # after it, so that no write in between is missed
            if other is None:
                self._kept = *taken, watched
            self._patience.tried(other is None)
            return other
        self._patience.waited += 1
        return changed(module, watched)


class Serving:
    """A level that serves, of which calls are kept.

    Args:
        calls: those.
        roots: gives all that they depend on beside their inputs, or None where that cannot be read; asked only where
            something is kept, or is to be.
    """

    def __init__(self, calls: KeptCalls, roots: Callable[[], Any]) -> None:
        self._calls, self._read = calls, roots
        self._roots: Any = None

    def still(self) -> bool:
        """Whether a call may be served by what is kept."""
        return self._calls.still(self._known_roots())

    def _known_roots(self) -> Any:
        if self._roots is None and not self._calls.empty:
            self._roots = self._read()
        return self._roots

    def serve(self, routing: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The level's outputs; None: this call goes the usual way."""
        single = all(x is inputs[0] for x in inputs)
        fits = single is self._calls.single and (single or len(inputs) == routing.num_inputs)
        if not (fits or self._calls.empty):
            return None
        return self._calls.serve(self._known_roots(), inputs[0] if single else inputs)

    def offer(self, inputs: Sequence[Tensor], *arguments: Any) -> None:
        """A call that goes the usual way, by an ``expert_mixture`` of these arguments."""
        if self._calls.wants():
            self._calls.single = all(x is inputs[0] for x in inputs)
            roots = self._read()
            if roots is not None:
                self._calls.keep(roots, *arguments)
