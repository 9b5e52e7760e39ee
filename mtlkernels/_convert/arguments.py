"""With which arguments a method was tried: a call with others may ask for what fused evaluation knows nothing of.

A mask, a scale or labels that a method takes may change what it returns, and only the streams of a description's
``inputs`` go the fused way. A call is brought into the form that trials had, arguments by their places; what no trial
gave has to be as the method has it by default. A flag, a word, an Enum's member, None or a number has to be as one of
them gave it, where all gave such a value; but where they gave several numbers, it may be any.
"""

from __future__ import annotations

import enum
import inspect
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# Of which code asks what they are, and does something else for another: a trial has shown those alone that it gave.
_TELLING = (bool, str, type(None), enum.Enum)
# What is told by its value, where another object may be given; NumPy's numbers are of the last kind.
_PLAIN = (bool, str, type(None), int, float, numbers.Number)


class Absent:
    """In the place of a value: there is nothing of the name."""


class Parameter(NamedTuple):
    """One of a method's; ``default`` is Absent where there is none, ``name`` empty where it goes by its place alone."""

    name: str
    default: Any


class Parameters(NamedTuple):
    """A method's parameters without the instance: those that have a place, then those that are given by name only."""

    placed: tuple[Parameter, ...]
    named: tuple[Parameter, ...]

    @classmethod
    def of(cls, method: Callable[..., Any]) -> Parameters | None:
        """None where they cannot be told."""
        try:
            parameters = inspect.signature(method).parameters.values()
        except (TypeError, ValueError):
            return None
        placed = [
            Parameter("" if p.kind is p.POSITIONAL_ONLY else p.name, Absent if p.default is p.empty else p.default)
            for p in parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        named = [
            Parameter(p.name, Absent if p.default is p.empty else p.default)
            for p in parameters
            if p.kind is p.KEYWORD_ONLY
        ]
        return cls(tuple(placed[1:]), tuple(named))


# What is kept of a call's arguments.
Told = tuple[Any, ...]


def told(arguments: Sequence[Any]) -> Told:
    """The words, flags, numbers, Enums' members and None among them, with Absent in the place of others."""
    kinds = (*_TELLING, numbers.Number)
    return tuple(value if isinstance(value, kinds) else Absent for value in arguments)


def _tells(values: Sequence[Any]) -> bool:
    """Whether a call may give at a place only what a trial gave there: other numbers too where trials gave several."""
    given = [value for value in values if not isinstance(value, _TELLING)]
    return Absent not in given and all(_is_same(value, given[0]) for value in given)


class Tried(NamedTuple):
    """The arguments of trials: how many there were, and at which places what is told alone, and which.

    ``number`` is None where there were more in one than in another: calls with others are no matter then. ``streams``
    are the numbers of streams that were made of them, empty where none is known.
    """

    number: int | None
    telling: tuple[tuple[int, tuple[Any, ...]], ...] = ()
    streams: tuple[int, ...] = ()

    @classmethod
    def of(cls, calls: Sequence[Told], streams: Iterable[int] = ()) -> Tried:
        """Of calls, as :func:`told` has them."""
        counts, of_streams = set(map(len, calls)), tuple(sorted(streams))
        if len(counts) != 1:
            return cls(None, streams=of_streams)
        telling = [
            (place, tuple(dict.fromkeys(values)))
            for place, values in enumerate(zip(*calls, strict=True))
            if _tells(values)
        ]
        return cls(counts.pop(), tuple(telling), of_streams)

    def bring(
        self, parameters: Parameters | None, needed: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a call as trials had them; None for others, with which the method's own code has to run.

        An argument that trials had and the call has not is the method's default, but for the first ``needed`` of them.
        """
        if self.number is None:
            return args, kwargs
        if not kwargs and len(args) == self.number:
            return (args, kwargs) if not self.telling or self._are_told(args) else None
        if parameters is None or len(args) > max(self.number, len(parameters.placed)):
            return None
        placed, named = parameters.placed, dict(kwargs)
        values = [*args, *(named.pop(parameter.name, Absent) for parameter in placed[len(args) :])]
        beyond = zip(values[self.number :], placed[self.number :], strict=False)
        if not all(value is Absent or _is_default(value, parameter) for value, parameter in beyond):
            return None
        for name, value in named.items():
            if not any(other.name == name and _is_default(value, other) for other in parameters.named):
                return None
        found = values[: self.number]
        for place in range(min(self.number, len(placed))):
            if found[place] is Absent and place >= needed:
                found[place] = placed[place].default
        if len(found) < self.number or any(value is Absent for value in found):
            return None
        return (tuple(found), {}) if self._are_told(found) else None

    def _are_told(self, values: Sequence[Any]) -> bool:
        """Whether what tells is as a trial gave it."""
        return all([any([_is_same(values[place], value) for value in tried]) for place, tried in self.telling])


def needed_by(inputs: Callable[..., Any]) -> int:
    """How many arguments a description's ``inputs`` has no default for, beside the instance."""
    found = Parameters.of(inputs)
    return 0 if found is None else sum(parameter.default is Absent for parameter in found.placed)


def _is_default(value: Any, parameter: Parameter) -> bool:
    return _is_same(value, parameter.default)


def _is_same(value: Any, other: Any) -> bool:
    """Whether both are one object, or the same number, word or flag."""
    if value is other:
        return True
    return type(value) is type(other) and isinstance(other, _PLAIN) and bool(value == other)
