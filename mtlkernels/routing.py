"""Which expert reads which input, and which gate mixes which experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any


def as_int(value: object) -> int | None:
    """A whole number, also one of NumPy's, as PyTorch's layers take them; None for what is none, a bool among it."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)


def _index_tuple(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {type(value).__name__}")
    items: list[int] = []
    for item in value:
        index = as_int(item)
        if index is None:
            raise TypeError(f"{name} must hold ints, got {type(item).__name__} ({item!r})")
        items.append(index)
    return tuple(items)


@dataclass(frozen=True)
class Wiring:
    """A routing in the flat form that operators take, over the experts that some gate mixes.

    ``live`` are those experts, ``idle`` the others. The rest numbers experts by their place in ``live``:
    ``expert_inputs`` the stream that each reads, ``gate_experts`` the experts of all gates one after another,
    ``gate_sizes`` how many belong to each gate. ``specs`` keeps what :func:`mtlkernels.ops.level.call.spec_of` made.
    """

    live: tuple[int, ...]
    idle: tuple[int, ...]
    expert_inputs: tuple[int, ...]
    gate_experts: tuple[int, ...]
    gate_sizes: tuple[int, ...]
    specs: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)


def _count(name: str, value: object, minimum: int) -> int:
    count = as_int(value)
    if count is None:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    return count


@dataclass(frozen=True)
class Routing:
    """The wiring of one level of a multi-task model; immutable and hashable.

    Args:
        expert_inputs: for each of the E experts, the index of the input stream that it reads.
        gate_experts: for each of the K gates, the experts that it mixes, in the order of that gate's logits. Gates may
            see different numbers of experts. An expert that no gate mixes is never evaluated.

    Raises:
        TypeError: an argument is not a sequence of ints (a sequence of such sequences for ``gate_experts``).
        ValueError: there is no expert or no gate, a gate is empty, names an expert that does not exist or names one
            twice, or a stream index is negative.
    """

    expert_inputs: tuple[int, ...]
    gate_experts: tuple[tuple[int, ...], ...]
    wiring: Wiring = field(init=False, repr=False, compare=False)

    if TYPE_CHECKING:  # any sequences do; fields hold tuples

        def __init__(self, expert_inputs: Sequence[int], gate_experts: Sequence[Sequence[int]]) -> None: ...

    def __post_init__(self) -> None:
        streams = _index_tuple("expert_inputs", self.expert_inputs)
        if not streams:
            raise ValueError("expert_inputs must name at least one expert's input stream, got an empty sequence")
        for expert, stream in enumerate(streams):
            if stream < 0:
                raise ValueError(f"expert_inputs[{expert}] must be a stream index of at least 0, got {stream}")
        given: object = self.gate_experts
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise TypeError(f"gate_experts must be a sequence of sequences of ints, got {type(given).__name__}")
        gates = tuple(_index_tuple(f"gate_experts[{k}]", gate) for k, gate in enumerate(given))
        if not gates:
            raise ValueError("gate_experts must hold at least one gate, got an empty sequence")
        for k, gate in enumerate(gates):
            if not gate:
                raise ValueError(f"gate_experts[{k}] must mix at least one expert, got an empty gate")
            for expert in gate:
                if not 0 <= expert < len(streams):
                    raise ValueError(f"gate_experts[{k}] must name experts in [0, {len(streams)}), got expert {expert}")
            if len(set(gate)) != len(gate):
                raise ValueError(f"gate_experts[{k}] must name each expert once, got {gate}")
        object.__setattr__(self, "expert_inputs", streams)
        object.__setattr__(self, "gate_experts", gates)
        used = {e for gate in gates for e in gate}
        live = tuple(e for e in range(len(streams)) if e in used)
        place = {e: i for i, e in enumerate(live)}
        wiring = Wiring(
            live=live,
            idle=tuple(e for e in range(len(streams)) if e not in used),
            expert_inputs=tuple(streams[e] for e in live),
            gate_experts=tuple(place[e] for gate in gates for e in gate),
            gate_sizes=tuple(len(gate) for gate in gates),
        )
        object.__setattr__(self, "wiring", wiring)

    @property
    def num_inputs(self) -> int:
        """G, the number of input streams, one more than the largest stream index."""
        return max(self.expert_inputs) + 1

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return len(self.expert_inputs)

    @property
    def num_gates(self) -> int:
        """K, the number of gates, and so of outputs."""
        return len(self.gate_experts)

    @classmethod
    def mmoe(cls, num_experts: int, num_tasks: int) -> Routing:
        """Multi-gate mixture of experts (Ma et al., KDD 2018): one stream, and every gate sees every expert."""
        num_experts = _count("num_experts", num_experts, 1)
        num_tasks = _count("num_tasks", num_tasks, 1)
        return cls((0,) * num_experts, (tuple(range(num_experts)),) * num_tasks)

    @classmethod
    def cgc(
        cls,
        num_tasks: int,
        num_specific: int | Sequence[int],
        num_shared: int,
        *,
        shared_gate: bool = False,
        shared_first: bool = False,
        single_input: bool = False,
    ) -> Routing:
        """Customized gate control, the level of PLE (Tang et al., RecSys 2020).

        Experts come task by task, then the shared ones. Streams are one per task, then the shared one.

        Args:
            num_tasks: T, the number of tasks.
            num_specific: experts of each task: an int, or one int a task.
            num_shared: experts that all tasks share.
            shared_gate: add a gate over all experts, in expert order, after the tasks' gates.
            shared_first: a task gate's logits are in the order (shared, specific) instead of (specific, shared).
            single_input: every expert reads stream 0, as at a model's first level.

        Raises:
            TypeError: a count is not an int, or a flag not True or False.
            ValueError: a count is negative, ``num_specific`` has not one entry a task, or a gate would be empty.
        """
        num_tasks = _count("num_tasks", num_tasks, 1)
        num_shared = _count("num_shared", num_shared, 0)
        flags = {"shared_gate": shared_gate, "shared_first": shared_first, "single_input": single_input}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
        if isinstance(num_specific, Integral):
            specific = (_count("num_specific", num_specific, 0),) * num_tasks
        else:
            specific = _index_tuple("num_specific", num_specific)
            if len(specific) != num_tasks:
                raise ValueError(
                    f"num_specific must be an int or hold one int a task ({num_tasks}), got {len(specific)} entries"
                )
            for task, count in enumerate(specific):
                _count(f"num_specific[{task}]", count, 0)
        streams: list[int] = []
        own: list[tuple[int, ...]] = []
        for task, count in enumerate(specific):
            own.append(tuple(range(len(streams), len(streams) + count)))
            streams += [task] * count
        if num_shared == 0 and 0 in specific:
            raise ValueError(f"num_specific must give each task an expert where num_shared is 0, got {num_specific}")
        shared = tuple(range(len(streams), len(streams) + num_shared))
        streams += [num_tasks] * num_shared
        gates = [shared + mine if shared_first else mine + shared for mine in own]
        if shared_gate:
            gates.append(tuple(range(len(streams))))
        if single_input:
            streams = [0] * len(streams)
        return cls(tuple(streams), tuple(gates))
