"""Methods that hold one or more levels, with whatever is in front of them and behind: whole models, and trunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels._convert.classes import Converted
from mtlkernels._convert.evaluation import Parts, evaluate
from mtlkernels._convert.level import (
    Level,
    as_list,
    examine_parts,
    one_argument,
    only_argument,
    prepare,
    random_streams,
    replaced_line,
)
from mtlkernels._convert.mlp import Rows
from mtlkernels._convert.report import Line
from mtlkernels._convert.trial import disagreement, kept_random_state
from mtlkernels.routing import Routing


@dataclass(frozen=True)
class Trunk:
    """How a class's method is taken apart.

    Args:
        levels: from an instance, its levels, each of which reads what the one before it gave.
        inputs: from an instance and the arguments of the method, the streams of the first level; None for a call to
            leave alone.
        outputs: from an instance and the streams behind the last level, what the method returns.
        arguments: from an instance and streams, arguments of the method from which ``inputs`` makes these streams.
        example: in place of ``arguments`` where ``inputs`` does more than pick its arguments apart: from an instance
            and a number of rows, arguments of the method. Then ``inputs`` is called once a call at most.
        method: its name.
        without: attributes that both ways call alike, and that a trial leaves out.
    """

    levels: Callable[[Any], Sequence[Level]]
    inputs: Callable[..., Sequence[Tensor] | Tensor | None] = only_argument
    outputs: Callable[[Any, Sequence[Tensor]], Any] = as_list
    arguments: Callable[[Any, Sequence[Tensor]], tuple[Any, ...]] = one_argument
    example: Callable[[Any, int], tuple[Any, ...]] | None = None
    method: str = "forward"
    without: tuple[str, ...] = ()

    def run(self, module: Any, parts: Sequence[Parts], streams: Sequence[Tensor]) -> Any:
        """What the method returns, from the streams of the first level."""
        for level, found in zip(self.levels(module), parts, strict=True):
            mixed = evaluate(found, streams)
            streams = mixed if level.level_outputs is None else level.level_outputs(module, mixed, streams)
        return self.outputs(module, streams)

    def prepare(self, module: Any, plan: Sequence[Routing], rows: Tensor | None) -> list[Parts] | None:
        """The parts of every level, None where the module's own code has to run."""
        found = []
        levels = self.levels(module)
        if len(levels) != len(plan):
            return None
        for level, routing in zip(levels, plan, strict=True):
            parts = prepare(level, module, routing, rows)
            if parts is None:
                return None
            found.append(parts)
        return found


class FusedTrunk(Converted):
    """A method with its levels as :class:`FusedLevel` has one; its plan is a Routing a level."""

    _mtlkernels_trunk: Trunk | None

    @classmethod
    def _mtlkernels_planner(cls, base: type) -> Callable[[nn.Module, str], tuple[Any, list[Line]]]:
        """How :class:`Converter` plans for an instance of ``base``."""
        assert cls._mtlkernels_trunk is not None
        return functools.partial(plan_trunk, cls._mtlkernels_trunk, base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original class's."""
        found = self._mtlkernels_call("forward", args, kwargs)
        return super().forward(*args, **kwargs) if found is None else found[0]  # type: ignore[misc]

    @classmethod
    def _mtlkernels_fused(cls, name: str) -> Callable[..., Any]:
        """The same for a method of another name."""

        def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = self._mtlkernels_call(name, args, kwargs)
            return getattr(super(cls, self), name)(*args, **kwargs) if found is None else found[0]

        return fused

    def _mtlkernels_call(self: Any, name: str, args: Any, kwargs: Any) -> tuple[Any] | None:
        """The result by itself; None where the class's own code has to run."""
        trunk: Trunk | None = self._mtlkernels_trunk
        if trunk is None or trunk.method != name:
            return None
        plan = self._mtlkernels_plan
        if trunk.example is not None:
            parts = trunk.prepare(self, plan, _first_tensor((args, kwargs)))
            streams = None if parts is None else _streams(trunk, self, args, kwargs)
            if parts is None or streams is None:
                return None
            _check_streams(streams)
            return (trunk.run(self, parts, streams),)
        streams = _streams(trunk, self, args, kwargs)
        if streams is None or not all(x.dim() == 2 for x in streams):
            return None
        parts = trunk.prepare(self, plan, streams[0])
        return None if parts is None else (trunk.run(self, parts, streams),)


def _streams(trunk: Trunk, module: Any, args: Any, kwargs: Any) -> Sequence[Tensor] | None:
    streams = trunk.inputs(module, *args, **kwargs)
    return (streams,) if isinstance(streams, Tensor) else streams


def _check_streams(streams: Sequence[Tensor]) -> None:
    """What ``inputs`` made of a call cannot be given up for the class's own code, which would do it again."""
    for i, x in enumerate(streams):
        if x.dim() != 2:
            raise ValueError(
                f"inputs, with which this class is registered, must give streams [B, D], got stream {i} of shape "
                f"{list(x.shape)}; it has to return None for a call that the class's own code is to run"
            )


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor with rows in arguments, to tell how many there are; None where that cannot be told."""
    if isinstance(value, Tensor):
        return value if value.dim() > 0 else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(_first_tensor, parts) if found is not None), None)


def plan_trunk(trunk: Trunk, base: Any, module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    """The plan of a module of class ``base``, as :class:`Converter` wants it, once it has proved right in a trial."""
    name, method = type(module).__name__, trunk.method
    reason: str | None = None
    plan: tuple[Any, ...] = ()
    levels: Sequence[Level] = ()
    if getattr(type(module), method) is not getattr(base, method) or method in vars(module):
        reason = f"its {method} is not that of {base.__name__}"
    else:
        try:
            levels = trunk.levels(module)
            plan = tuple(examine_parts(level, module, level.routing(module)) for level in levels)
            reason = next((found for found in plan if isinstance(found, str)), None if levels else "it has no levels")
        except Exception as error:  # of a description that does not fit; it goes into the report
            reason = f"its description does not fit: {type(error).__name__}: {error}"
    if reason is None:
        reason = _trial(trunk, module, plan)
    if reason is not None:
        return None, [Line("left alone", path, name, reason)]
    parts = [f"{name} level {i}" if len(levels) > 1 else name for i in range(len(levels))]
    return plan, [replaced_line(level, module, path, part) for level, part in zip(levels, parts, strict=True)]


def _trial(trunk: Trunk, module: nn.Module, plan: Sequence[Routing]) -> str | None:
    """What is wrong with evaluating the levels otherwise, as a trial of copies tells; None where nothing is."""

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        if trunk.example is not None:
            return _example(trunk.example, other, rows, generator)
        return trunk.arguments(other, random_streams(trunk.levels(other)[0], other, plan[0], rows, generator))

    def fused(other: Any, *args: Any) -> Any:
        streams = _streams(trunk, other, args, {})
        if streams is None:
            raise ValueError("inputs gave None for the arguments of the trial")
        allowed = Rows(True, True)
        parts = [level.read(other, r, allowed) for level, r in zip(trunk.levels(other), plan, strict=True)]
        return trunk.run(other, parts, streams)

    def original(other: Any, *args: Any) -> Any:
        return other(*args) if trunk.method == "forward" else getattr(other, trunk.method)(*args)

    return disagreement(module, fused, arguments, original=original, without=trunk.without)


def _example(
    example: Callable[[Any, int], tuple[Any, ...]], module: Any, rows: int, generator: torch.Generator
) -> tuple[Any, ...]:
    """A user's example with numbers in float64; its random ones are not taken for the forward's."""
    with kept_random_state():
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        given = example(module, rows)
    return tuple(_in_double(given))


def _in_double(value: Any) -> Any:
    """The same with floating-point tensors in float64, as the copies that are tried have their weights."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_double(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_in_double, value))
    return value
