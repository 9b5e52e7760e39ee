"""Where a class keeps what its levels are made of, and how the method that holds them is taken apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlkernels import _decisions, _torch
from mtlkernels._backends import autocast_enabled
from mtlkernels._convert.arguments import Tried, needed_by
from mtlkernels._convert.chains import Chain, flatten
from mtlkernels._convert.classes import CLASSES, OWN_UNDER_AUTOCAST, TRIED, WATCHED, is_torchs, original_class
from mtlkernels._convert.evaluation import (
    CALLS,
    CallsOfLevels,
    Parts,
    Serving,
    any_drops,
    evaluate,
    read_experts,
    several_dtypes,
)
from mtlkernels._convert.gates import has_equal_shares, read_gate, size_of
from mtlkernels._convert.paying import in_trial, pays, size_of_call
from mtlkernels._convert.watched import changed
from mtlkernels.ops._fusing import has_gradient_hooks, has_hooks
from mtlkernels.ops.level.kept import KeptCalls
from mtlkernels.routing import Routing

TOO_FEW_ROWS = "its experts cannot be fused now, or that is no faster on so few rows"


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


def children(*modules: Any) -> list[Any]:
    """All their sub-modules."""
    return [child for module in modules for child in module._modules.values()]


def cgc(specific: Iterable[Sized], shared: Sized, **options: bool) -> Routing:
    """The routing of CGC with these lists of experts, one a task."""
    counts = [len(experts) for experts in specific]
    return Routing.cgc(len(counts), counts, len(shared), **options)


@dataclass(frozen=True)
class LevelDescription:
    """Where a class keeps what a level is made of.

    Args:
        experts: from an instance, its experts' chains, in the order of the routing.
        gates: from an instance, the chains that give each gate's logits, perhaps with a softmax and a dropout behind;
            None for equal shares.
        routing: from an instance, who reads what; asked for once.
        parts: from an instance, the modules that are not called any more, on which a hook may be.
        num_streams: from an instance, how many streams it takes; None for as many as experts and gates read.
        gate_inputs: from an instance, the number of the stream that each gate reads; None: gate k reads stream k.
        level_outputs: from an instance, the K mixtures and the streams that the level read, the streams behind it;
            None: the mixtures.
    """

    experts: Callable[[Any], Iterable[Chain]]
    gates: Callable[[Any], Sequence[Chain]]
    routing: Callable[[Any], Routing]
    parts: Callable[[Any], Iterable[Any]] = children
    num_streams: Callable[[Any], int] | None = None
    gate_inputs: Callable[[Any], Sequence[int]] | None = None
    level_outputs: Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None

    def read_gates(self, module: Any) -> list[Any]:
        """For each gate what :func:`read_gate` says."""
        return [read_gate(chain) for chain in self.gates(module)]

    def read_gate_inputs(self, module: Any, gates: Sequence[Any], routing: Routing) -> Sequence[int] | None:
        """The stream of each gate; gates of equal shares read none, and have any."""
        if self.gate_inputs is not None:
            return tuple(self.gate_inputs(module))
        if routing.num_inputs > 1 and any(map(has_equal_shares, gates)):
            return [0 if has_equal_shares(gate) else k for k, gate in enumerate(gates)]
        return None

    def roots(self, module: Any, routing: Routing) -> Any:
        """All that a call depends on beside its inputs; None where :meth:`prepare` says that it cannot be read.

        Which stream a gate reads is not among it: calls are kept where gates read one stream, or each its own.
        """
        try:
            gates: Any = self.gates(module)
            chains = list(self.experts(module)), gates if isinstance(gates, Tensor) else list(gates)
            return *chains, list(self.parts(module)), routing.expert_inputs, routing.gate_experts
        except Exception:  # of a description that what has become of the module does not fit
            return None

    def prepare(self, module: Any, routing: Routing, x: Tensor | None, dtype: torch.dtype | None = None) -> Parts | str:
        """The parts of a level as :func:`evaluate` takes them, or why the module's own code has to run.

        ``x`` is any tensor with as many rows as the input, which may not be there yet; None where none tells. ``dtype``
        is that of the input, None where it is not there yet.
        """
        found = self._parts_or_reason(module, routing, x, dtype)
        if isinstance(found, str):
            _decisions.note(type(module).__name__, "its own code", found, x)
        return found

    def _parts_or_reason(
        self, module: Any, routing: Routing, x: Tensor | None, dtype: torch.dtype | None
    ) -> Parts | str:
        if not pays(module, x):
            return "there are no kernels for its device and dtype"
        try:
            chains, gate_chains, parts = list(self.experts(module)), list(self.gates(module)), list(self.parts(module))
        except Exception as error:  # of a description that what has become of the module does not fit
            return f"its description does not fit any more: {type(error).__name__}: {error}"
        size = size_of_call(x, module.training)
        experts = read_experts(chains, size)
        if experts is None:
            return TOO_FEW_ROWS
        gates: list[Any] = list(map(read_gate, gate_chains))
        if (len(chains), len(gates)) != (routing.num_experts, routing.num_gates):
            return "it has other numbers of experts and gates than when it was converted"
        autocast = autocast_enabled("cpu" if x is None else x.device.type)
        if autocast and OWN_UNDER_AUTOCAST in vars(module):
            return "under autocast its outputs would be other ones, as a trial told when it was converted"
        if autocast and any(
            layer.activation == "dice" for layers in experts[0] if not isinstance(layers, str) for layer in layers
        ):
            return "torch-rechub's Dice makes float32 of what autocast makes narrower, and the fused operator does not"
        pairs = zip(gates, routing.gate_experts, strict=True)
        if any(not isinstance(gate, str) and size_of(gate) not in (None, len(mixed)) for gate, mixed in pairs):
            return "its gates mix other numbers of experts than when it was converted"
        differentiated = torch.is_grad_enabled()
        tried = vars(module).get(CLASSES)
        if any(isinstance(gate, str) for gate in gates) or any_hooks(parts, differentiated, tried):
            return (
                "a gate was exchanged, or a part that would not be called has a hook, or one of its parameters, or is"
                " of a class that there was none of when it was converted"
            )
        if not size.parts and any_drops(gates):
            return TOO_FEW_ROWS
        if several_dtypes(experts[0], gates, dtype) and not autocast:
            return "it has parameters of several dtypes, or of another than its input"
        return Parts(chains, *experts, gates, routing, size.rows, self.read_gate_inputs(module, gates, routing))


def any_hooks(modules: Iterable[Any], differentiated: bool, tried: Container[type] | None) -> bool:
    """Whether one of the modules, or one below, has a hook; if ``differentiated`` also one on a parameter.

    Or whether its class is neither PyTorch's nor among those that were ``tried``, where these are known.
    """
    for module in modules:
        if module is None:
            continue
        if has_hooks(module) or (differentiated and has_gradient_hooks(module)):
            return True
        if tried is not None and type(module) not in tried and _is_new(module, tried):
            return True
        if module._modules and any_hooks(module._modules.values(), differentiated, tried):
            return True
    return False


def _is_new(module: Any, tried: Container[type]) -> bool:
    """A part may have been converted itself."""
    if is_torchs(type(module)):
        return False
    kind = _torch.class_of(module)
    return (original_class(kind) or kind) not in tried


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

    def call(self, module: Any, plan: Sequence[Routing | None], args: Any, kwargs: Any) -> tuple[Any] | None:
        """What the method returns, by itself; None where the class's own code has to run."""
        if module._forward_hooks and module._parameters:
            return None  # TorchJD's autogram looks for its parameters, and may not find them behind a fused level
        tried: Tried | None = vars(module).get(TRIED)
        if tried is not None:
            args, kwargs = tried.bring(module._mtlkernels_parameters, self.needed, args, kwargs), {}
            if args is None:
                _decisions.note(type(module).__name__, "its own code", "no trial had such arguments")
                return None
        call = _SmallCall.of(self, module, args, kwargs)
        if call is not None and call.has_too_few_rows():
            return None
        other = changed(module, vars(module).get(WATCHED, ()))
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
            if streams is None or not all(x.dim() == 2 and x.layout is torch.strided for x in streams):
                return None
        x = _first_tensor((args, kwargs)) if streams is None else streams[0]
        dtype = None if streams is None else streams[0].dtype
        prepare = functools.partial(_prepare, levels, plan, module, x, dtype, call)
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
        for i, level in enumerate(levels):
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

    def streams(self, module: Any, args: Any, kwargs: Any) -> Sequence[Tensor] | None:
        """The streams of the first level, None for a call that the class's own code is to run."""
        streams: Any = self.inputs(module, *args, **kwargs)
        if isinstance(streams, Tensor):
            return (streams,)
        whole = isinstance(streams, (list, tuple)) and all(isinstance(x, Tensor) for x in streams)
        return streams if whole else None


def _prepare(
    levels: Sequence[LevelDescription],
    plan: Sequence[Routing | None],
    module: Any,
    x: Tensor | None,
    dtype: torch.dtype | None,
    call: _SmallCall | None,
) -> list[Parts] | None:
    """The parts of every level, None where the module's own code has to run."""
    prepared = []
    for level, routing in zip(levels, plan, strict=True):
        if routing is None:
            return None
        parts = level.prepare(module, routing, x, dtype)
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
        x = _first_tensor((args, kwargs))
        rows = None if x is None else x.size(0)
        if type(rows) is not int:  # but a symbol of a tracer, which must not be kept
            return None
        number = None if trunk.level_of is None else trunk.level_of(module, *args, **kwargs)
        return cls(module, (number, module.training, torch.is_grad_enabled()), rows)

    def has_too_few_rows(self) -> bool:
        """Whether a call of no fewer rows was read before, and had too few."""
        calls = self.module.__dict__.get(CALLS)
        return calls is not None and calls.too_few.are(self.key, self.rows)

    def note(self) -> None:
        """It was read, and had too few."""
        _calls_of(self.module).too_few.note(self.key, self.rows)


def _calls_of(module: Any) -> CallsOfLevels:
    """What is kept of a module's calls."""
    calls: CallsOfLevels | None = module.__dict__.get(CALLS)
    if calls is None:
        calls = module.__dict__[CALLS] = CallsOfLevels()
    return calls


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
    calls = _calls_of(module)
    return [
        Serving(calls.of(number), functools.partial(level.roots, module, routing))  # type: ignore[arg-type]
        for level, routing, number in zip(levels, plan, numbers, strict=True)
    ]


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
    return next((tensor for tensor in map(_first_tensor, parts) if tensor is not None), None)
