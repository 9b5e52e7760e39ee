"""Modules whose ``forward`` is one level of experts, gates and mixing, of whatever library a description is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain, flatten, path_of, read_chain
from mtlkernels._convert.classes import Converted
from mtlkernels._convert.evaluation import Parts, describe, evaluate, left_to_modules, read_parts
from mtlkernels._convert.gates import Gate, has_equal_shares, read_gate
from mtlkernels._convert.kernels import pays
from mtlkernels._convert.mlp import Rows, in_trial, odd_weight, rows_of
from mtlkernels._convert.products import Product
from mtlkernels._convert.report import Line
from mtlkernels._convert.trial import disagreement
from mtlkernels.nn.level import watched
from mtlkernels.routing import Routing


def only_argument(module: Any, *args: Any, **kwargs: Any) -> Sequence[Tensor] | None:
    """The streams of a ``forward`` that takes one tensor, or a sequence of one a stream, and nothing else."""
    given = (*args, *kwargs.values())
    if len(given) != 1:
        return None
    return given if isinstance(given[0], Tensor) else given[0]


def one_argument(module: Any, streams: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of such a ``forward``: a tensor where there is one stream, else a list."""
    return (streams[0] if len(streams) == 1 else list(streams),)


def as_list(module: Any, mixed: Sequence[Tensor]) -> Any:
    """What most libraries return."""
    return list(mixed)


def children(module: Any) -> Iterable[Any]:
    """All sub-modules."""
    found: Iterable[Any] = module._modules.values()
    return found


@dataclass(frozen=True)
class Level:
    """Where a class keeps what a level is made of.

    Args:
        experts: from an instance, its experts' chains, in the order of the routing.
        gates: from an instance, the chains that give each gate's logits, perhaps with a softmax and a dropout behind;
            None for equal shares.
        routing: from an instance, who reads what; asked for once.
        inputs: from an instance and the arguments of ``forward``, the input streams; None for a call to leave alone.
        arguments: the inverse: from an instance and streams, the arguments of ``forward``.
        outputs: from an instance and the K mixtures, what ``forward`` returns.
        parts: from an instance, the modules that are not called any more, on which a hook may be.
        streams: from an instance, how many streams ``arguments`` takes; None for as many as experts and gates read.
        gate_inputs: from an instance, the number of the stream that each gate reads; None: gate k reads stream k.
        level_outputs: among several levels in one method: from an instance, the K mixtures and the streams that the
            level read, the streams behind it; None: the mixtures.
    """

    experts: Callable[[Any], Iterable[Chain]]
    gates: Callable[[Any], Sequence[Chain]]
    routing: Callable[[Any], Routing]
    inputs: Callable[..., Sequence[Tensor] | None] = only_argument
    arguments: Callable[[Any, Sequence[Tensor]], tuple[Any, ...]] = one_argument
    outputs: Callable[[Any, Sequence[Tensor]], Any] = as_list
    parts: Callable[[Any], Iterable[Any]] = children
    streams: Callable[[Any], int] | None = None
    gate_inputs: Callable[[Any], Sequence[int]] | None = None
    level_outputs: Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None

    def read_gate_inputs(self, module: Any, gates: Sequence[Any], routing: Routing) -> Sequence[int] | None:
        """The stream of each gate; gates of equal shares read none, and have any."""
        if self.gate_inputs is not None:
            return tuple(self.gate_inputs(module))
        if any(map(has_equal_shares, gates)) and routing.num_inputs > 1:
            return [0 if has_equal_shares(gate) else k for k, gate in enumerate(gates)]
        return None

    def read(self, module: Any, routing: Routing, rows: Rows) -> Parts:
        """All parts of an instance."""
        gates: list[Any] = [read_gate(chain) for chain in self.gates(module)]
        at = self.read_gate_inputs(module, gates, routing)
        return read_parts(list(self.experts(module)), gates, routing, rows, at)


class FusedLevel(Converted):
    """A level as one ``expert_mixture``, or as near to it as its modules allow; its plan is the Routing."""

    _mtlkernels_level: Level | None

    @classmethod
    def _mtlkernels_planner(cls, base: type) -> Callable[[nn.Module, str], tuple[Any, list[Line]]]:
        """How :class:`Converter` plans for an instance of ``base``."""
        assert cls._mtlkernels_level is not None
        return functools.partial(plan_level, cls._mtlkernels_level, base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the original class's."""
        level, routing = self._mtlkernels_level, self._mtlkernels_plan
        streams: Any = None if level is None else level.inputs(self, *args, **kwargs)
        parts = None
        if level is not None and streams is not None and all(x.dim() == 2 for x in streams):
            parts = prepare(level, self, routing, streams[0])
        if parts is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return level.outputs(self, evaluate(parts, streams))


def watched_part(model: nn.Module, parts: Iterable[Any]) -> str | None:
    """The report's words for a part that does more than its class's forward, and that would not be called."""
    inner = [module for part in parts if part is not None for module in part.modules()]
    found = next((module for module in inner if watched(module)), None)
    if found is None:
        return None
    what = "a forward of its own" if "forward" in vars(found) else "a hook"
    name = next((name for name, module in model.named_modules() if module is found), "")
    return f"{name or type(found).__name__} has {what}, and would not be called"


def any_watched(modules: Iterable[Any]) -> bool:
    """Whether one of the modules, or one below, has a hook."""
    for module in modules:
        if module is not None and (watched(module) or (module._modules and any_watched(module._modules.values()))):
            return True
    return False


def prepare(level: Level, module: Any, routing: Routing, rows: Tensor | None) -> Parts | None:
    """The parts of a level as :func:`evaluate` takes them, None where the module's own code has to run.

    ``rows`` is any tensor with as many rows as the input, which may not be there yet; None where none tells.
    """
    if not (in_trial() or pays(module, rows)) or (rows is not None and left_to_modules(level.experts(module), rows)):
        return None
    chains = list(level.experts(module))
    gates: list[Any] = [read_gate(chain) for chain in level.gates(module)]
    if (len(chains), len(gates)) != (routing.num_experts, routing.num_gates):
        return None
    if any(isinstance(gate, str) for gate in gates) or any_watched(level.parts(module)):
        return None
    allowed = Rows(True, True) if rows is None else rows_of(rows)
    return read_parts(chains, gates, routing, allowed, level.read_gate_inputs(module, gates, routing))


def plan_level(level: Level, base: type, module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    """The plan of a module of class ``base``, as :class:`Converter` wants it, once it has proved right in a trial."""
    name = type(module).__name__
    try:
        routing = examine(level, base, module)
    except Exception as error:  # of a description that does not fit; it goes into the report
        routing = f"its description does not fit: {type(error).__name__}: {error}"
    reason = routing if isinstance(routing, str) else trial(level, module, routing)
    if reason is not None:
        return None, [Line("left alone", path, name, reason)]
    return routing, [replaced_line(level, module, path)]


def replaced_line(level: Level, module: nn.Module, path: str, part: str = "") -> Line:
    """The report's line for a level that is replaced, or of which only the mixing is."""
    gates: list[Any] = [read_gate(chain) for chain in level.gates(module)]
    fused, detail = describe(module, list(level.experts(module)), level.gates(module), gates)
    return Line("replaced" if fused else "mixing fused", path, part or type(module).__name__, detail)


def examine(level: Level, base: Any, module: Any) -> Routing | str:
    """The routing of a level that can be evaluated otherwise, or why it cannot, as far as its parts tell."""
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"its forward is not that of {base.__name__}"
    return examine_parts(level, module, level.routing(module))


def examine_parts(level: Level, module: Any, routing: Routing) -> Routing | str:
    """The same for the parts alone."""
    chains = list(level.experts(module))
    if not chains:
        return "it has no experts"
    heard = watched_part(module, level.parts(module))
    if heard is not None:
        return heard
    for chain in chains:
        layers = read_chain(chain)
        odd = None if isinstance(layers, str) else odd_weight(layers)  # which copies for a trial would not have
        if odd is not None:
            return odd + path_of(module, chain, odd)
    gates = [read_gate(chain) for chain in level.gates(module)]
    for gate, chain in zip(gates, level.gates(module), strict=True):
        if isinstance(gate, str):
            return gate + path_of(module, chain, gate)
    if (len(chains), len(gates)) != (routing.num_experts, routing.num_gates):
        return f"it has {len(chains)} experts and {len(gates)} gates, but its routing {routing}"
    for k, (found, mixed) in enumerate(zip(gates, routing.gate_experts, strict=True)):
        if isinstance(found, Gate) and found.size not in (None, len(mixed)):
            return f"gate {k} has {found.size} logits for {len(mixed)} experts"
    at = level.read_gate_inputs(module, gates, routing)
    if at is not None and len(at) != len(gates):
        return f"its gate_inputs have {len(at)} entries for {len(gates)} gates"
    return routing


def trial(level: Level, module: nn.Module, routing: Routing) -> str | None:
    """What is wrong with evaluating the level otherwise, as a trial of copies tells; None where nothing is."""

    def parts(other: Any) -> Parts:
        return level.read(other, routing, Rows(True, True))

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        return level.arguments(other, random_streams(level, other, routing, rows, generator))

    def fused(other: Any, *args: Any) -> Any:
        return level.outputs(other, evaluate(parts(other), level.inputs(other, *args) or ()))

    return disagreement(module, fused, arguments)


def random_streams(level: Level, module: Any, routing: Routing, rows: int, generator: torch.Generator) -> list[Tensor]:
    """Input streams for a trial of a level."""
    count = routing.num_inputs
    gates: list[Any] = [read_gate(chain) for chain in level.gates(module)]
    at = level.read_gate_inputs(module, gates, routing)
    if at is not None:
        count = max(count, *(i + 1 for i, gate in zip(at, gates, strict=True) if not has_equal_shares(gate)))
    elif level.streams is not None:
        count = level.streams(module)
    elif count > 1:  # without shared experts, a shared gate alone reads the last stream
        count = max(count, routing.num_gates)
    shape = (rows, width_of(level, module))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def width_of(level: Level, module: Any) -> int:
    """The features of a level's input: its first matrix has as many columns."""
    chains = [chain for chain in (*level.experts(module), *level.gates(module)) if chain is not None]
    steps = [step for chain in chains for step in flatten(chain) if isinstance(step, (nn.Module, Product))]
    matrices = (p for step in steps for p in step.parameters() if p.dim() == 2)
    return int(next(matrices).shape[1])
