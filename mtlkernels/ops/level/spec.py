"""What is static about a level: who reads what, what its layers do, and the order in which its tensors travel.

Everything about a level but its tensors is a :class:`LevelSpec`. Operators take one as a list of ints and a list of
floats, and the level's tensors as flat lists whose order the spec knows; csrc/cpu/level/spec.h reads the same lists.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels.ops.activations import CODES, from_input, has_slopes

Item = TypeVar("Item")

# Of a level, kept: losses may reach outputs in many ways.
_MAX_PARTS = 64

# The code of a norm is the dimension of the pre-activations [E, B, H] over which its statistics are taken.
NO_NORM, BATCH_NORM, LAYER_NORM = 0, 1, 2


class Layer(NamedTuple):
    """What follows the product of an expert's layer.

    ``activation`` is a code of :mod:`mtlkernels.ops.activations`; ``norm`` one of the codes above, with ``eps``;
    ``dice_eps`` is that of the activation "dice"; ``dropout`` the rate.
    """

    activation: int
    norm: int = NO_NORM
    eps: float = 0.0
    dice_eps: float = 0.0
    dropout: float = 0.0


class Groups(NamedTuple):
    """One value for each kind of tensor that a level has, in the order in which they travel.

    Parameters of experts are lists over layers, then experts: layer l of expert e stands at l * E + e. ``gates`` are K
    logits [B, N_k] or, of linear gates, K weights [N_k, D], whose biases are ``gate_biases``.
    """

    inputs: Any
    weights: Any
    biases: Any
    scales: Any
    shifts: Any
    slopes: Any
    gates: Any
    gate_biases: Any


class Reached(NamedTuple):
    """The part of a level on which some of its outputs depend; or such parts of several losses, side by side.

    ``spec`` is that of the part, unless it is empty; ``inputs``, ``experts`` and ``gates`` are the numbers that its own
    have in the whole. ``places`` are where its tensors stand among those of the whole level, once for each loss.
    """

    spec: LevelSpec
    inputs: tuple[int, ...]
    experts: tuple[int, ...]
    gates: tuple[int, ...]
    places: tuple[int, ...]

    def pick(self, groups: Groups) -> Groups:
        """The part's tensors of those of the whole level."""
        count = len(groups.weights) // len(self.spec.layers)
        experts = [layer * count + e for layer in range(len(self.spec.layers)) for e in self.experts]
        where = (self.inputs, *[experts] * 5, self.gates, self.gates)
        return Groups(*([group[i] for i in at] if group else [] for group, at in zip(groups, where, strict=True)))


@dataclass(frozen=True)
class LevelSpec:
    """A level of experts and the gates that mix them.

    Args:
        num_inputs: G, the number of input streams.
        expert_inputs: for each of the E experts, the stream that it reads.
        gate_experts: the experts of all gates one after another, in the order of their logits.
        gate_sizes: how many experts each of the K gates mixes.
        layers: what follows each layer's product.
        gate_inputs: of gates that are linear layers, the stream that each reads; empty where logits are given.
        numbers: the experts' numbers in the level of which this one is a part, as dropout counts them and what is
            saved is stacked; not part of the encoding, which is that of whole levels.

    Raises:
        ValueError: counts do not agree, or a stream, an expert, a code or a rate is not one.
    """

    num_inputs: int
    expert_inputs: tuple[int, ...]
    gate_experts: tuple[int, ...]
    gate_sizes: tuple[int, ...]
    layers: tuple[Layer, ...]
    gate_inputs: tuple[int, ...] = ()
    numbers: tuple[int, ...] = field(default=(), repr=False)
    # What follows from these. Plain attributes, as the compiler, which makes specs while it traces, knows them.
    # Whether the pre-activations of all layers are stored, as statistics, masks and slopes want them.
    stores_inputs: bool = field(init=False, repr=False, compare=False)
    has_norms: bool = field(init=False, repr=False, compare=False)
    has_slopes: bool = field(init=False, repr=False, compare=False)
    # How many tensors of each kind there are, those of norms and slopes only where a layer has them; and of all kinds.
    sizes: Groups = field(init=False, repr=False, compare=False)
    num_tensors: int = field(init=False, repr=False, compare=False)
    # The streams that no expert and no gate reads.
    unread: tuple[int, ...] = field(init=False, repr=False, compare=False)
    encoded: tuple[tuple[int, ...], tuple[float, ...]] = field(init=False, repr=False, compare=False)
    _reached: dict[tuple[bool, ...], Reached] = field(default_factory=dict, init=False, repr=False, compare=False)
    # What launchers on GPUs remember of earlier calls, by their direction, see mtlkernels.ops._recording.
    recordings: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        has_norms = any(layer.norm for layer in self.layers)
        sloped = any(has_slopes(layer.activation) for layer in self.layers)
        stores_inputs = has_norms or sloped or any(layer.dropout > 0 for layer in self.layers)
        self._check(stores_inputs)
        each, gates = len(self.layers) * len(self.expert_inputs), len(self.gate_sizes)
        norms, slopes = each * has_norms, each * sloped
        sizes = Groups(self.num_inputs, each, each, norms, norms, slopes, gates, len(self.gate_inputs))
        read = (*self.expert_inputs, *self.gate_inputs)
        object.__setattr__(self, "numbers", self.numbers or tuple(range(len(self.expert_inputs))))
        object.__setattr__(self, "stores_inputs", stores_inputs)
        object.__setattr__(self, "has_norms", has_norms)
        object.__setattr__(self, "has_slopes", sloped)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "num_tensors", sum(sizes))
        object.__setattr__(self, "unread", tuple(i for i in range(self.num_inputs) if i not in read))
        object.__setattr__(self, "encoded", self._encoded())

    def __reduce__(self) -> Any:
        """Copies and pickles are made anew: what this one keeps is of calls that were made with it."""
        own = (self.num_inputs, self.expert_inputs, self.gate_experts, self.gate_sizes, self.layers, self.gate_inputs)
        return LevelSpec, (*own, self.numbers)

    def _check(self, stores_inputs: bool) -> None:
        experts, gates = len(self.expert_inputs), len(self.gate_sizes)
        _require(min(experts, gates, len(self.layers), *self.gate_sizes) > 0, "hold an expert, a layer and full gates")
        _require(sum(self.gate_sizes) == len(self.gate_experts), "name an expert for each of its gates' logits")
        _require(_within(self.gate_experts, experts), f"name experts in [0, {experts})")
        _require(_within((*self.expert_inputs, *self.gate_inputs), self.num_inputs), "name streams that there are")
        _require(len(self.gate_inputs) in (0, gates), f"name a stream for each of {gates} gates")
        for layer in self.layers:
            _require(0 <= layer.activation < len(CODES), f"hold codes of activations, not {layer.activation}")
            _require(NO_NORM <= layer.norm <= LAYER_NORM, f"hold codes of norms, not {layer.norm}")
            _require(0 <= layer.dropout <= 1, f"hold rates of dropout in [0, 1], not {layer.dropout}")
        _require(not (stores_inputs and self.gate_inputs), "take the logits of a level with norms, dropout or slopes")

    def _encoded(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The ints and floats that operators take.

        The ints are G, E, K, L and whether gates are linear; E streams, K sizes, L activations and L norms; K streams
        of linear gates; and the gates' experts. The floats are L eps, L eps of Dice and L rates of dropout, or none
        where all are zero.
        """
        counts = (self.num_inputs, len(self.expert_inputs), len(self.gate_sizes), len(self.layers))
        columns: Any = (tuple(layer[i] for layer in self.layers) for i in range(5))
        activations, norms, *numbers = columns
        wiring = (*self.expert_inputs, *self.gate_sizes, *activations, *norms, *self.gate_inputs, *self.gate_experts)
        floats = tuple(value for run in numbers for value in run)
        return (*counts, int(len(self.gate_inputs) > 0), *wiring), floats if any(floats) else ()

    def split(self, tensors: Sequence[Any]) -> Groups:
        """The groups of a flat sequence of all of a level's tensors, or of a value for each."""
        return Groups(*_runs(tensors, self.sizes))

    def operands(self, tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
        """The same as operators take it: inputs, parameters, and gates."""
        gates = self.num_tensors - self.sizes.gates - self.sizes.gate_biases
        return tensors[: self.num_inputs], tensors[self.num_inputs : gates], tensors[gates : self.num_tensors]

    def spread(self, values: Iterable[Item]) -> list[Item]:
        """A value of each kind of tensor, repeated for each of its tensors."""
        return [value for value, size in zip(values, self.sizes, strict=True) for _ in range(size)]

    def split_results(self, results: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What the forward pass returns: the K outputs, and what it saves."""
        count = len(self.gate_sizes)
        return results[:count], results[count:]

    def split_saved(self, saved: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """What the forward pass saved: a tensor [E, B, H] a layer; statistics of norms; linear gates' logits; signs.

        The last layer's is [E, B * H] where :meth:`saves_panels` is true.
        Statistics are the means of all layers that have a norm, then the variances; of what is without norms the
        second part is empty. The third is the logits [B, sum N_k], in a list. The fourth is what :meth:`last_saved` or
        :attr:`hidden_signs` describes. Of some experts only, a last layer is in no part: only the C++ kernels read it.
        """
        stats = sum(layer.norm > 0 for layer in self.layers)
        end = len(saved) - 2 * stats - bool(self.gate_inputs)
        layers = signs = next((i for i in range(end) if not saved[i].dtype.is_floating_point), end)
        if layers > 1 and saved[layers - 1].shape[0] < saved[0].shape[0]:
            layers -= 1
        return saved[:layers], saved[end : end + 2 * stats], saved[end + 2 * stats :], saved[signs:end]

    @property
    def hidden_signs(self) -> tuple[int, ...]:
        """The hidden layers of which the forward pass saves signs as well on GPUs, where no layer saves its inputs.

        relu's gradient wants no more of them, a 16th of the bytes or less: bit i % 32 of word i // 32 of int32
        [E, B, ceil(H / 32)] says whether output i is not <= 0.
        """
        hidden = range(0 if self.stores_inputs else len(self.layers) - 1)
        return tuple(i for i in hidden if self.layers[i].activation == CODES["relu"])

    def sign_words(self, widths: Sequence[int]) -> list[int]:
        """How many words a row of each of :attr:`hidden_signs` has; ``widths`` are of all layers' outputs."""
        return [-(-widths[i] // 32) for i in self.hidden_signs]

    def last_saved(self, x: Tensor) -> tuple[int, ...]:
        """The experts whose last layer the forward pass saves, for inputs like ``x``.

        On GPUs all; on CPUs those that several gates mix, or one gate more than once. Of any other, what gates want
        follows from the last layer's gradient and from the output of the layer below, see csrc/cpu/level/level_args.h,
        which has the same rule: relu's gradient wants no more than which outputs are not <= 0, a bit each, bit i % 8 of
        byte i // 8 of uint8 [others, B, ceil(H / 8)].
        """
        experts = range(len(self.expert_inputs))
        if x.device.type == "cuda" or not self._signs_suffice(x.dtype):
            return tuple(experts)
        uses = Counter(self.gate_experts)
        return tuple(e for e in experts if uses[e] > 1)

    def saves_panels(self, x: Tensor) -> bool:
        """Whether the last layer is saved in panels, see :func:`reference.panels`, for inputs like ``x``."""
        return x.device.type != "cuda" and not self.stores_inputs

    def _signs_suffice(self, dtype: torch.dtype) -> bool:
        if self.stores_inputs or len(self.layers) == 1 or dtype == torch.float16:
            return False
        below, last = (layer.activation for layer in self.layers[-2:])
        return last in (CODES["relu"], CODES["none"]) and not from_input(below)

    def saves_signs(self, x: Tensor) -> bool:
        """Whether there are experts whose last layer is not saved, but signs of it."""
        return self.layers[-1].activation == CODES["relu"] and len(self.last_saved(x)) < len(self.expert_inputs)

    # Parts -----------------------------------------------------------------------------------------------------------

    def reached(self, outputs: Iterable[bool]) -> Reached:
        """The part of the level on which those outputs depend of which ``outputs`` is true.

        Of several losses there are K flags each; the part is then a level of the parts that each of them reaches, side
        by side: streams, experts and gates are in it once for each loss that reaches them.
        """
        mask = tuple(outputs)
        found = self._reached.get(mask)
        if found is None:
            if len(self._reached) == _MAX_PARTS:
                self._reached.clear()
            found = self._reached[mask] = self._find_reached(mask)
        return found

    def _find_reached(self, mask: tuple[bool, ...]) -> Reached:
        if not any(mask):
            return Reached(self, (), (), (), ())
        count, members = len(self.gate_sizes), list(_runs(self.gate_experts, self.gate_sizes))
        # A loss and a number in the whole level, of each stream, expert and gate of the part.
        inputs: list[tuple[int, int]] = []
        experts: list[tuple[int, int]] = []
        gates: list[tuple[int, int]] = []
        for loss, start in enumerate(range(0, len(mask), count)):
            used = [k for k in range(count) if mask[start + k]]
            live = sorted({e for k in used for e in members[k]})
            read = {self.expert_inputs[e] for e in live} | {self.gate_inputs[k] for k in used if self.gate_inputs}
            for pairs, numbers in ((inputs, sorted(read)), (experts, live), (gates, used)):
                pairs += [(loss, number) for number in numbers]
        stream, place = ({pair: i for i, pair in enumerate(pairs)} for pairs in (inputs, experts))
        part = replace(
            self,
            num_inputs=len(inputs),
            expert_inputs=tuple(stream[loss, self.expert_inputs[e]] for loss, e in experts),
            gate_experts=tuple(place[loss, e] for loss, k in gates for e in members[k]),
            gate_sizes=tuple(self.gate_sizes[k] for _, k in gates),
            gate_inputs=tuple(stream[loss, self.gate_inputs[k]] for loss, k in gates if self.gate_inputs),
            numbers=tuple(self.numbers[e] for _, e in experts),
        )
        places: list[int] = []
        first = 0
        widths = (self.num_inputs, *[len(self.expert_inputs)] * 5, count, count)
        for size, width, pairs in zip(self.sizes, widths, (inputs, *[experts] * 5, gates, gates), strict=True):
            for block in range(first, first + size, width):
                places += [loss * self.num_tensors + block + number for loss, number in pairs]
            first += size
        of_inputs, of_experts, of_gates = (tuple(number for _, number in pairs) for pairs in (inputs, experts, gates))
        return Reached(part, of_inputs, of_experts, of_gates, tuple(places))

    def returned(self, grad_outputs: Sequence[Any], tensors: Sequence[Any], needs: Sequence[bool]) -> list[int]:
        """Whose gradients the backward operator returns, in that order.

        Of those of a level's tensors that there are, of a kind of which ``needs`` is true (one for each of
        :class:`Groups`), and on which an output depends that has a gradient: their numbers; and where ``grad_outputs``
        are those of several losses, loss * num_tensors + number.
        """
        wanted, count = self.spread(needs), self.num_tensors
        places = sorted(self.reached(grad is not None for grad in grad_outputs).places)
        return [at for at in places if wanted[at % count] and tensors[at % count] is not None]

    def repeated(self, times: int, shared_inputs: bool) -> LevelSpec:
        """``times`` independent copies side by side; with ``shared_inputs`` all read the same streams."""
        streams, experts = (0 if shared_inputs else self.num_inputs), len(self.expert_inputs)
        return replace(
            self,
            num_inputs=self.num_inputs if shared_inputs else self.num_inputs * times,
            expert_inputs=tuple(s + v * streams for v in range(times) for s in self.expert_inputs),
            gate_experts=tuple(e + v * experts for v in range(times) for e in self.gate_experts),
            gate_sizes=self.gate_sizes * times,
            gate_inputs=tuple(s + v * streams for v in range(times) for s in self.gate_inputs),
            numbers=(),
        )

    @property
    def shared(self) -> LevelSpec:
        """The spec that everybody gets who decodes this one's encoding, and that therefore keeps the recordings."""
        found = self.__dict__.get("_shared")
        if found is None:
            found = LevelSpec.decoded(*self.encoded)
            object.__setattr__(self, "_shared", found)
        spec: LevelSpec = found
        return spec

    @property
    def words(self) -> bytes:
        """The ints of :attr:`encoded`, side by side in 64 bits each, as C++ reads them sooner than one by one."""
        found = self.__dict__.get("_words")
        if found is None:
            found = array("q", self.encoded[0]).tobytes()
            object.__setattr__(self, "_words", found)
        words: bytes = found
        return words

    @staticmethod
    def decoded(ints: Sequence[int], floats: Sequence[float]) -> LevelSpec:
        """The spec of :attr:`encoded`.

        Raises:
            ValueError: the lists are not those of a spec.
        """
        decode = _decode if _torch.compiling() else _decode_once
        return decode(tuple(ints), tuple(floats))


def _decode(ints: tuple[int, ...], floats: tuple[float, ...]) -> LevelSpec:
    _require(len(ints) >= 5 and min(ints) >= 0, "begin with four counts and a flag")
    inputs, experts, gates, layers, linear = list(ints[:5])
    sizes = (experts, gates, layers, layers, gates * linear)
    _require(linear < 2 and len(ints) >= 5 + sum(sizes), "be as long as its counts say")
    streams, gate_sizes, activations, norms, gate_inputs = _runs(ints[5:], sizes)
    _require(len(floats) in (0, 3 * layers), f"come with {3 * layers} floats")
    numbers = _runs(floats or (0.0,) * (3 * layers), (layers,) * 3)
    of_layers = tuple(Layer(*values) for values in zip(activations, norms, *numbers, strict=True))
    return LevelSpec(inputs, streams, ints[5 + sum(sizes) :], gate_sizes, of_layers, gate_inputs)


_decode_once = lru_cache(maxsize=1024)(_decode)


def _runs(values: Sequence[Any], sizes: Iterable[int]) -> Iterable[Any]:
    """The values in runs of these sizes."""
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _within(values: Sequence[int], end: int) -> bool:
    return len(values) == 0 or (min(values) >= 0 and max(values) < end)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"spec must {what}")
