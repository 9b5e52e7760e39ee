"""Where a class keeps what its levels are made of, and how the method that holds them is taken apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlkernels import _decisions, _torch
from mtlkernels._backends import autocast_enabled
from mtlkernels._convert.arguments import Tried, needed_by
from mtlkernels._convert.calls import CALLS, Serving, calls_of, may_be_kept
from mtlkernels._convert.chains import flatten
from mtlkernels._convert.classes import SOFTMAXES, TRIED, WATCHED
from mtlkernels._convert.evaluation import Parts, evaluate
from mtlkernels._convert.gates import has_softmax
from mtlkernels._convert.levels import TOO_FEW_ROWS, LevelDescription
from mtlkernels._convert.paying import in_trial
from mtlkernels._convert.watched import Watched, changed
from mtlkernels.ops.level.kept import KeptCalls
from mtlkernels.routing import Routing

# For each level of an instance, which gates have a softmax of their own.
Softmaxes = tuple[tuple[bool, ...], ...]


def only_argument(module: Any, *args: Any, **kwargs: Any) -> Sequence[Tensor] | Tensor | None:
    """The streams of a method that takes one tensor, or a sequence of one a stream, and nothing else."""
    given = (*args, *kwargs.values())
    return given[0] if len(given) == 1 else None


def one_argument(module: Any, streams: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of such a method: a tensor where there is one stream, else a list."""
    return (streams[0] if len(streams) == 1 else list(streams),)


def as_list(module: Any, mixed: Sequence[Tensor]) -> Any:
    """What most libraries return."""
    return list(mixed)


@dataclass(frozen=True)
class TrunkDescription:
    """How a class's method with one or more levels is taken apart.

    Args:
        levels: from an instance, its levels, each of which reads what the one before it gave.
        inputs: from an instance and the arguments of the method, the streams of the first level; None for a call to
            leave alone.
        outputs: from an instance and the streams behind the last level, what the method returns.
        arguments: from an instance and streams, arguments of the method for a trial, from which ``inputs`` makes these
            streams or others like them.
        example: in place of ``arguments``: from an instance and a number of rows, arguments of the method.
        embeds: whether ``inputs`` does more than pick its arguments apart, so that it is called once a call at most.
        method: its name.
        refusal: from an instance, why nothing of it can be fused, as far as its settings tell.
        trial: from an instance, what :func:`mtlkernels._convert.trial.disagreement` takes beside.
        level_of: from an instance and the arguments of the method, the number of the level that a call evaluates alone;
            None where it evaluates all.
        plan: from an instance and its path in the model, its plan, where it is not made as that of other classes.
        writes: attributes of an instance that ``outputs`` writes as the method does, and that nothing else reads.
        needed: how many arguments ``inputs`` has no default for, as is read of it.
    """

    levels: Callable[[Any], Sequence[LevelDescription]]
    inputs: Callable[..., Sequence[Tensor] | Tensor | None] = only_argument
    outputs: Callable[[Any, Sequence[Tensor]], Any] = as_list
    arguments: Callable[[Any, Sequence[Tensor]], tuple[Any, ...]] = one_argument
    example: Callable[[Any, int], tuple[Any, ...]] | None = None
    embeds: bool = False
    method: str = "forward"
    refusal: Callable[[Any], str | None] = lambda module: None
    trial: Callable[[Any], Mapping[str, Any]] = lambda module: {}
    level_of: Callable[..., int] | None = None
    plan: Callable[[Any, str], Any] | None = None
    writes: Sequence[str] = ()
    needed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needed", needed_by(self.inputs))  # as it is frozen

    @classmethod
    def of(cls, level: LevelDescription, **options: Any) -> TrunkDescription:
        """A method with one level."""
        return cls(levels=lambda module: (level,), **options)

    def call(
        self, module: Any, plan: Sequence[Routing | None], args: Any, kwargs: Any, counts: set[int] | None = None
    ) -> tuple[Any] | None:
        """What the method returns, by itself; None where the class's own code has to run.

        ``counts`` gets the number of its streams, where it is given.
        """
        if module._forward_hooks and module._parameters:
            return None  # TorchJD's autogram looks for its parameters, and may not find them behind a fused level
        tried: Tried | None = vars(module).get(TRIED)
        if tried is not None:
            brought = tried.bring(module._mtlkernels_parameters, self.needed, args, kwargs)
            if brought is None:
                _decisions.note(type(module).__name__, "its own code", "no trial had such arguments")
                return None
            args, kwargs = brought
        call = _SmallCall.of(self, module, args, kwargs)
        if call is not None and call.has_too_few_rows():
            return None
        watched = vars(module).get(WATCHED)
        other = None if watched is None else _changed(module, watched)
        if other is not None:
            _decisions.note(type(module).__name__, "its own code", f"{other} is another than when it was converted")
            return None
        levels = self.levels(module)
        if len(levels) != len(plan):
            return None
        numbers: Sequence[int] = range(len(levels))
        if self.level_of is not None:
            numbers = (self.level_of(module, *args, **kwargs),)
            levels, plan = [levels[numbers[0]]], [plan[numbers[0]]]
        streams = None
        if not self.embeds:
            streams = self.streams(module, args, kwargs)
            if streams is None:
                return None
            if not _are_as_tried(streams, tried):
                _decisions.note(type(module).__name__, "its own code", "no trial had such streams")
                return None
        x = _first_tensor((args, kwargs)) if streams is None else streams[0]
        dtype = None if streams is None else streams[0].dtype
        prepare = functools.partial(_prepare, levels, plan, numbers, module, x, dtype, call)
        serving = _serving(levels, plan, numbers, module, x)
        # Where nothing is lost if it then goes the usual way, what is kept is compared in the same call.
        at_once = len(levels) == 1 and not self.embeds
        kept = serving is not None and (at_once or all([level.still() for level in serving]))
        parts = None if kept else prepare()
        if parts is None and not kept:
            return None
        if streams is None:
            streams = self.streams(module, args, kwargs)
            if streams is None:
                return None
            _check_streams(streams)
            if not _are_as_tried(streams, tried):
                _check_can_be_repeated(module, streams, tried)
                return None
        if counts is not None:
            counts.add(len(streams))
        for i, level in enumerate(levels):
            if counts is not None:
                _check_count(i, plan[i], streams)
            mixed = serving[i].serve(plan[i], streams) if kept else None  # type: ignore[index]
            if mixed is None:
                parts = parts or prepare()
                if parts is None:
                    return None
                mixed = evaluate(parts[i], streams, serving[i] if serving else None)
            streams = mixed if level.level_outputs is None else level.level_outputs(module, mixed, streams)
        return (self.outputs(module, streams),)

    def read(self, module: Any) -> list[Any]:
        """The modules in the chains, which each call reads."""
        levels = self.levels(module)
        chains = (chain for level in levels for chain in (*level.experts(module), *level.gates(module)))
        return [step for chain in chains if chain is not None for step in flatten(chain)]

    def softmaxes(self, module: Any) -> Softmaxes:
        """Those of an instance now."""
        return tuple([tuple(map(has_softmax, level.read_gates(module))) for level in self.levels(module)])

    def streams(self, module: Any, args: Any, kwargs: Any) -> Sequence[Tensor] | None:
        """The streams of the first level, None for a call that the class's own code is to run."""
        streams: Any = self.inputs(module, *args, **kwargs)
        if isinstance(streams, Tensor):
            return (streams,)
        whole = isinstance(streams, (list, tuple)) and all(isinstance(x, Tensor) for x in streams)
        return streams if whole else None


def _changed(module: Any, watched: Watched) -> str | None:
    """:func:`watched.changed`, the compiler's guards being made of what it looks at."""
    return changed(module, watched) if _torch.compiling() else calls_of(module).seen.changed(module, watched)


def _prepare(
    levels: Sequence[LevelDescription],
    plan: Sequence[Routing | None],
    numbers: Sequence[int],
    module: Any,
    x: Tensor | None,
    dtype: torch.dtype | None,
    call: _SmallCall | None,
) -> list[Parts] | None:
    """The parts of every level, None where the module's own code has to run."""
    prepared = []
    calls = calls_of(module) if x is not None and may_be_kept() else None
    softmaxes = vars(module).get(SOFTMAXES)
    for level, routing, number in zip(levels, plan, numbers, strict=True):
        if routing is None:
            return None
        readings = None if calls is None else calls.readings(number)
        then = None if softmaxes is None else softmaxes[number]
        parts = level.prepare(module, routing, x, dtype, readings, then)
        if isinstance(parts, str):
            if parts is TOO_FEW_ROWS and call is not None:
                call.note()
            return None
        prepared.append(parts)
    return prepared


class _SmallCall(NamedTuple):
    """A call that may have too few rows to be fused; ``key`` tells it apart from others beside these."""

    module: Any
    key: Hashable
    rows: int

    @classmethod
    def of(cls, trunk: TrunkDescription, module: Any, args: Any, kwargs: Any) -> _SmallCall | None:
        """None where all is to be read at each call: for trials, logs and the compiler."""
        if _torch.compiling() or in_trial() or _decisions.on:
            return None
        x = args[0] if args and type(args[0]) is Tensor and args[0].dim() > 0 else _first_tensor((args, kwargs))
        if x is None or type(x.size(0)) is not int:  # but a symbol of a tracer, which must not be kept
            return None
        number = None if trunk.level_of is None else trunk.level_of(module, *args, **kwargs)
        differentiated = torch.is_grad_enabled()
        wants = differentiated and x.requires_grad
        casts = autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        key = number, module.training, differentiated, wants, casts
        return cls(module, key, x.size(0))

    def has_too_few_rows(self) -> bool:
        """Whether a call of no fewer rows was read before, and had too few."""
        calls = self.module.__dict__.get(CALLS)
        return calls is not None and calls.too_few.are(self.key, self.rows)

    def note(self) -> None:
        """It was read, and had too few."""
        calls_of(self.module).too_few.note(self.key, self.rows)


def _serving(
    levels: Sequence[LevelDescription],
    plan: Sequence[Routing | None],
    numbers: Sequence[int],
    module: Any,
    x: Tensor | None,
) -> list[Serving] | None:
    """Levels of which calls may be kept, by their numbers; None for a call that is none of them."""
    if _torch.compiling() or in_trial() or None in plan or not KeptCalls.may_serve(x):
        return None
    calls = calls_of(module)
    return [
        Serving(calls.of(number), functools.partial(level.roots, module, routing))  # type: ignore[arg-type]
        for level, routing, number in zip(levels, plan, numbers, strict=True)
    ]


def _are_as_tried(streams: Sequence[Tensor], tried: Tried | None) -> bool:
    """Whether streams are dense and [B, D] with one B, where own code may broadcast some, and as many as in a trial."""
    if tried is not None and tried.streams and len(streams) not in tried.streams:
        return False
    strided, rows = torch.strided, None
    for x in streams:
        if x.dim() != 2 or x.layout is not strided:
            return False
        if rows is None:
            rows = x.size(0)
        elif x.size(0) != rows:
            return False
    return rows is not None


def _check_can_be_repeated(module: Any, streams: Sequence[Tensor], tried: Tried | None) -> None:
    """In evaluation own code may do again what ``inputs`` did; in training norms would have the batch twice."""
    if any(part.training for part in module.modules()):
        count = f"{tried.streams[0]} streams" if tried is not None and len(tried.streams) == 1 else "streams"
        raise ValueError(
            f"inputs, with which this class is registered, must give {count} [B, D] of one B in training, got shapes "
            f"{[list(x.shape) for x in streams]}; it has to return None for a call that the class's own code is to run"
        )


def _check_streams(streams: Sequence[Tensor]) -> None:
    """What ``inputs`` made of a call cannot be given up for the class's own code, which would do it again."""
    for i, x in enumerate(streams):
        if x.dim() != 2:
            raise ValueError(
                f"inputs, with which this class is registered, must give streams [B, D], got stream {i} of shape "
                f"{list(x.shape)}; it has to return None for a call that the class's own code is to run"
            )


def _check_count(i: int, routing: Routing | None, streams: Sequence[Tensor]) -> None:
    """In a trial, of which the report says it."""
    if routing is not None and len(streams) < routing.num_inputs:
        raise ValueError(f"level {i} reads {routing.num_inputs} streams, but is given {len(streams)}")


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor with rows in arguments, to tell how many there are; None where that cannot be told."""
    if isinstance(value, Tensor):
        return value if value.dim() > 0 else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((tensor for tensor in map(_first_tensor, parts) if tensor is not None), None)
